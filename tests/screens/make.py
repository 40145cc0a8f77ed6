"""Keep what every command shows: ``python tests/screens/make.py`` runs them all and writes ``80/`` and ``120/``.

Each command runs on a terminal of its own in a folder with a little of the shipped data. What is seen in the end is kept as
text, a file per subcommand; measured numbers are written as zeros, and the folder as ``/home/me/clip-data``.
"""

from __future__ import annotations

import functools
import os
import re
import shlex
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a command; under pytest it is there already

import forks
from place import make_place
from scenes import SCENES, Scene
from terminal import Terminal

HERE = Path(__file__).parent
WIDTHS = (80, 120)
_FOLDER = "/home/me/clip-data"  # as long as the real one, so that lines break alike
_DIGITS = r"\d[\d,]*"
_UNITS = r"/s|%|\s(?:images/s|samples/s|s|ms|MB|GB|MiB|GiB|bytes|pairs|iterations|hours)"
_HASH = re.compile(r"(?<=blake2b:)[0-9a-f]{32}|(?<=\")[0-9a-f]{32}(?=\"\])")
# What differs from run to run, or between machines.
_VARYING = re.compile(
    rf"(?<![\w.-])(?:{_DIGITS})?\.?\d+e[+-]?\d+"  # 1.5e-06
    rf"|(?:(?<![\w.-])|(?<=[ (\n]-)){_DIGITS}\.\d+"  # measured values
    rf"|(?<![\w.-])(?!95%){_DIGITS}(?=(?:{_UNITS})(?!\w))"
    rf"|(?<![\w.-]){_DIGITS}(?:/{_DIGITS}(?= samples)|(?=/{_DIGITS} \w))"  # done of total; total of what was left to train
    r"|\b\d?\d:\d\d(?::\d\d)?\b"  # durations
    rf"|(?<=iterations  ){' *'}{_DIGITS}|(?<=at step ){_DIGITS}|(?<=from step ){_DIGITS}|(?<=images/s: ){_DIGITS}"
    rf"|(?<=\d, ){_DIGITS}(?= kB)"  # of files that record times
)
# What a dry run adds where, for a moment, images were decoded more slowly than the model takes them.
_SLOW_DECODING = re.compile(r"More cores and --workers decode more\.\n|, bound by decoding")
# The last column of a table, images/s, or C; or images/s before the time of single images.
_LAST_COLUMN = re.compile(rf"(?<=[\d%*] ) *{_DIGITS}(?=$| +[\d.]+ / [\d.]+$)", re.MULTILINE)


def make_screens(folders: dict[int, Path], exact_only: tuple[int, ...] = ()) -> None:
    """Run every command on terminals of some widths and write what they show.

    Args:
        folders: Where the screens of each width are written.
        exact_only: Widths of which only the exact scenes are wanted. Where a width has all, these repeat its commands.
    """
    with tempfile.TemporaryDirectory(prefix="clip-", dir="/tmp") as name:
        place = make_place(Path(name))
        for subcommand, scenes in SCENES.items():
            shown: dict[int, list[str]] = {width: [] for width in folders}
            for scene in scenes:
                for width, screens in shown.items():
                    if scene.exact or width not in exact_only:
                        screens.append(_play(scene, place, width))
            for width, screens in shown.items():
                folders[width].mkdir(parents=True, exist_ok=True)
                (folders[width] / f"{subcommand}.txt").write_text("\n".join(screens), encoding="utf-8")


def _play(scene: Scene, place: Path, width: int) -> str:
    if scene.before is not None:
        scene.before(place)
    command, _, log = scene.command.partition(" 2> ")
    terminal = Terminal(width)
    interrupt = functools.partial(forks.after_naming, scene.interrupt_at, _interrupt) if scene.interrupt_at else None
    outputs = terminal.path, place / log if log else terminal.path
    words = shlex.split(command)[1:]
    program = forks.start(words, place, _environment(command), hook=interrupt, outputs=outputs)
    text = terminal.watch(program)
    if log:
        text += (place / log).read_text(encoding="utf-8")
    text = _HASH.sub(lambda found: "0" * len(found[0]), text.replace(str(place), _FOLDER))
    if not scene.exact:
        text = _LAST_COLUMN.sub(_hide, _VARYING.sub(_hide, _SLOW_DECODING.sub("", text)))
    return f"=== {scene.about}\n$ {scene.command}\n{text.lstrip()}[exit {program.poll()}]\n"


def _environment(command: str) -> dict[str, str]:
    """Return that of a person's terminal, which sets its own size and colours."""
    environment = forks.clean_environment() | {"TERM": "xterm-256color", "CLIPCID_WORKERS": "0"}
    for name in ("COLUMNS", "LINES", "NO_COLOR"):
        environment.pop(name, None)
    # What `auto` chooses depends on the machine.
    precision = {} if "--compare" in command else {"CLIPCID_PRECISION": "fp32"}
    return environment | precision | {"CLIPCID_DEVICE": "cpu"}


def _interrupt() -> None:
    """Interrupt this process, as Ctrl-C does."""
    from clipcid_cli.commands import signals
    from clipcid_cli.runtime import interruption

    signals._UNNOTICED = 20.0  # how long it takes to save what is done depends on the machine
    os.kill(os.getpid(), signal.SIGINT)
    if not interruption.ask():  # work that saves itself goes on to its next step
        time.sleep(60)  # until another thread has ended the process


def _hide(found: re.Match[str]) -> str:
    """Return the same shape in zeros, so that columns stay where they were."""
    return re.sub(r"\d", "0", found[0])


if __name__ == "__main__":
    import make  # a command's process finds `_interrupt` by the name of this module

    for columns in WIDTHS:
        make.make_screens({columns: HERE / str(columns)})
    forks.close()
