"""Keep what every command shows: ``python tests/screens/make.py`` runs them all and writes ``80/`` and ``120/``.

Each command runs on a terminal of its own in a folder with a little of the shipped data. What is seen in the end is kept as
text, a file per subcommand; measured numbers are written as zeros, and the folder as ``/home/me/clip-data``.

``make.py WIDTH [FOLDER [WIDTH FOLDER]]``: one width alone, into another folder; the second time only exact screens, whose
commands are repeated where they were given the first time.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys
import tempfile
import time
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a command; under pytest it is there already

from package import import_package
from place import make_place
from scenes import SCENES, Scene
from terminal import run_in_terminal

from clipcid_cli.cli import main
from clipcid_cli.runtime import interruption

HERE = Path(__file__).parent
WIDTHS = (80, 120)
_FOLDER = "/home/me/clip-data"  # as long as the real one, so that lines break alike
_DIGITS = r"\d[\d,]*"
_UNITS = r"/s|%|\s(?:images/s|samples/s|s|ms|MB|GB|MiB|GiB|bytes|pairs|iterations|hours)"
_HASH = re.compile(r"(?<=blake2b:)[0-9a-f]{32}|(?<=\", \")[0-9a-f]{16}(?=\"\])")
# What differs from run to run, or between machines.
_VARYING = re.compile(
    rf"(?<![\w.-])(?:{_DIGITS})?\.?\d+e[+-]?\d+"  # 1.5e-06
    rf"|(?:(?<![\w.-])|(?<=[ (\n]-)){_DIGITS}\.\d+"  # measured values
    rf"|(?<![\w.-])(?!95%){_DIGITS}(?=(?:{_UNITS})(?!\w))"
    rf"|(?<![\w.-]){_DIGITS}(?:/{_DIGITS}(?= samples)|(?=/{_DIGITS} \w))"  # done of total; total of what was left to train
    r"|\b\d?\d:\d\d(?::\d\d)?\b"  # durations
    rf"|(?<=iterations  ){' *'}{_DIGITS}|(?<=at step ){_DIGITS}|(?<=from step ){_DIGITS}|(?<=images/s: ){_DIGITS}"
)
# The last column of a table, images/s, or C; or images/s before the time of single images.
_LAST_COLUMN = re.compile(rf"(?<=[\d%*] ) *{_DIGITS}(?=$| +[\d.]+ / [\d.]+$)", re.MULTILINE)


def make_screens(width: int, target: Path, exact: tuple[int, Path] | None = None) -> None:
    """Run every command on terminals of a width and write what they show.

    Args:
        exact: Another width, and where what exact scenes show on it is written.
    """
    os.environ |= {"TERM": "xterm-256color", "HF_HUB_OFFLINE": "1", "GOMP_SPINCOUNT": "0", "CLIPCID_WORKERS": "0"}
    os.environ |= {"CLIPCID_PRECISION": "fp32", "CLIPCID_DEVICE": "cpu"}  # what `auto` chooses depends on the machine
    for name in ("COLUMNS", "LINES"):  # they would stand above the size of the terminal
        os.environ.pop(name, None)
    import_package()  # once for all: a command is then a fork of this process
    with tempfile.TemporaryDirectory(prefix="clip-", dir="/tmp") as name:
        place = make_place(Path(name))
        for subcommand, scenes in SCENES.items():
            shown: list[str] = []
            repeated: list[str] = []
            for scene in scenes:
                shown.append(_play(scene, place, width))
                if exact is not None and scene.exact:
                    repeated.append(_play(scene, place, exact[0]))
            _write_screens(target, subcommand, shown)
            if exact is not None:
                _write_screens(exact[1], subcommand, repeated)


def _write_screens(folder: Path, subcommand: str, shown: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{subcommand}.txt").write_text("\n".join(shown), encoding="utf-8")


def _play(scene: Scene, place: Path, width: int) -> str:
    if scene.before is not None:
        scene.before(place)
    command, _, log = scene.command.partition(" 2> ")

    def run() -> None:
        os.chdir(place)
        if "--compare" in command:
            del os.environ["CLIPCID_PRECISION"]  # a comparison takes none
        if log:
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
        if scene.interrupt_at is not None:
            _interrupt_after(scene.interrupt_at)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115  # open until the process ends
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        main(shlex.split(command)[1:])

    text, code = run_in_terminal(run, width)
    if log:
        text += (place / log).read_text(encoding="utf-8")
    text = _HASH.sub(lambda found: "0" * len(found[0]), text.replace(str(place), _FOLDER))
    if not scene.exact:
        text = _LAST_COLUMN.sub(_hide, _VARYING.sub(_hide, text))
    return f"=== {scene.about}\n$ {scene.command}\n{text.lstrip()}[exit {code}]\n"


def _interrupt_after(pattern: str) -> None:
    """Interrupt this process, as Ctrl-C does, right after the first file of a pattern has its name: always at one place."""
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # ignored where the tests run in the background of a script
    is_named = is_over = False

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal is_named, is_over
        if event == "os.rename" and fnmatch(os.fsdecode(arguments[1]), f"*{pattern}"):
            is_named = True  # with the next event, the renaming is done
        elif is_named and not is_over and event == "open":
            is_over = True
            os.kill(os.getpid(), signal.SIGINT)
            if not interruption.ask():  # work that saves itself goes on to its next step
                time.sleep(60)  # until another thread has ended the process

    sys.addaudithook(watch)


def _hide(found: re.Match[str]) -> str:
    """Return the same shape in zeros, so that columns stay where they were."""
    return re.sub(r"\d", "0", found[0])


if __name__ == "__main__":
    for columns in WIDTHS if len(sys.argv) == 1 else [int(sys.argv[1])]:
        again = (int(sys.argv[3]), Path(sys.argv[4])) if len(sys.argv) > 3 else None
        make_screens(columns, Path(sys.argv[2]) if len(sys.argv) > 2 else HERE / str(columns), again)
