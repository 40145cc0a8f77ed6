"""Work directories from strangers: what they record starts nothing, and links in them lead nowhere."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import run_clipcid, shard_members, write_inputs, write_tar
from hostile_place import Place, few
from sidecars import edit_sidecar

_EMBEDDINGS = "clipcid-work/embeddings/model"
_SHORT = ("--steps", "1", "--batch-size", "4", "--val-fraction", "0")
_STEPS = {
    "embed": ("embed", "data", "--model", "model"),
    "balance": ("balance", "--keep", "0.7", "--write-shards", "made"),
    "cluster": ("cluster", "--num-clusters", "3", "--iterations", "2"),
    "distill": ("distill", "--student", "student.json", "--preset", "cid", "--name", "run", *_SHORT),
    "eval-zeroshot": ("eval-zeroshot", "model", "classified", "--predictions"),
    "eval-linear": ("eval-linear", "model", "--train", "classified", "--test", "classified"),
    "export": ("export", "model", "--format", "open-clip", "--out", "exported"),
}


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By step, a folder as it is before the step; treat it as read-only."""
    folder = tmp_path_factory.mktemp("before")
    now = folder / "now"
    write_inputs(now)
    for name, words in _STEPS.items():
        shutil.copytree(now, folder / name)
        run_clipcid(*words, cwd=now)
    return folder


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "place")


def fill(place: Place, source: Path) -> None:
    shutil.rmtree(place.work)
    shutil.copytree(source, place.work, symlinks=True)


_COMMANDS = [
    "file://pipe:touch touched",
    "file://file://pipe:touch touched",
    "pipe:touch touched",
    "data::file://pipe:touch touched",
    "FILE://pipe:touch touched",
    "~/x::pipe:touch touched",
    "{a,pipe:touch touched}",
    "http://127.0.0.1:1/0.tar{:,/1.tar}:pipe:touch touched",
]


@pytest.mark.parametrize("spec", few(2, _COMMANDS))
@pytest.mark.parametrize("step", few(1, ["embed", "distill"]))
def test_recorded_data_starts_nothing(place: Place, before: Path, step: str, spec: str) -> None:
    fill(place, before / "distill")
    edit_sidecar(place.work / _EMBEDDINGS / "embed.json", lambda sidecar: sidecar["data"].update(spec=spec))
    words = ("embed", "--model", "model", "--overwrite") if step == "embed" else _STEPS["distill"]
    outcome = place.run(*words)
    assert not outcome.problems(), outcome
    assert outcome.run.returncode == 1, outcome


_PATTERNS = {
    "one": "data/{0..1099511627776}.tar",
    "words": "data/{a,b}{c,d}{0..9}" + "{x,y}" * 40 + ".tar",
    "nested": "data/" + "{a," * 3000 + "}" * 3000 + ".tar",
    "letters": "data/{a..z}{a..z}{a..z}{a..z}{a..z}{a..z}.tar",
    "two": "data/{0..999999}{0..999999}.tar",
    "wide": "data/{-9223372036854775808..9223372036854775807}.tar",
    "many": "::".join(["data/{0..999999}.tar"] * 100),
}


@pytest.mark.parametrize("name", few(3, _PATTERNS))
def test_patterns_of_too_many_names_take_no_memory(place: Place, before: Path, name: str) -> None:
    spec = _PATTERNS[name]
    fill(place, before / "distill")
    edit_sidecar(place.work / _EMBEDDINGS / "embed.json", lambda sidecar: sidecar["data"].update(spec=spec))
    outcome = place.run(*_STEPS["distill"])
    assert not outcome.problems(), outcome
    assert outcome.run.returncode == 1, outcome


# What is a link in a work directory: the locks of outputs, files that are being written, finished ones.
_PLANTED: dict[str, Callable[[str], bool]] = {
    "locks": lambda name: name.endswith(".lock"),
    "partial files": lambda name: name.endswith(".partial"),
    "finished files": lambda name: not name.endswith((".lock", ".partial")),
}


_AFFECTED = ["balance", *(name for name in _STEPS if name != "balance")]


def plant(place: Place, path: Path, target: Path) -> None:
    """Put a link in the place of what a step makes, unless there is something, or a link above it."""
    above = [folder for folder in path.parents if folder.is_relative_to(place.work)]
    if not os.path.lexists(path) and not any(folder.is_symlink() for folder in above):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(target)


def list_made(place: Place, event: str, words: tuple[str, ...]) -> list[Path]:
    """Return the files or folders that a step makes in the folder that it runs in."""
    outcome = place.run(*words)
    assert not outcome.problems(), outcome
    made = [Path(path) for path in dict.fromkeys(outcome.notes(event))]
    return [path for path in made if path.is_relative_to(place.work)]


@pytest.mark.parametrize("kind", _PLANTED)
@pytest.mark.parametrize("step", few(1, _AFFECTED))
def test_links_in_the_place_of_files_lead_nowhere(place: Place, before: Path, step: str, kind: str) -> None:
    """Of every file that the step makes there is a link to the user's own before it begins."""
    fill(place, before / step)
    made = list_made(place, "wrote", _STEPS[step])
    fill(place, before / step)
    for index, path in enumerate(made):
        if _PLANTED[kind](path.name):
            plant(place, path, place.home / (".bashrc" if index % 2 else "not-there-yet"))
    outcome = place.run(*_STEPS[step])
    assert not outcome.problems(), outcome


@pytest.mark.parametrize("step", few(1, _AFFECTED))
def test_links_in_the_place_of_work_folders_lead_nowhere(place: Place, before: Path, step: str) -> None:
    fill(place, before / step)
    made = list_made(place, "made a folder", _STEPS[step])
    fill(place, before / step)
    for path in made:
        if path.name.startswith("."):
            plant(place, path, place.home / ".ssh")
    outcome = place.run(*_STEPS[step])
    assert not outcome.problems(), outcome


def leave_complete(place: Place, **files: bytes) -> Path:
    """Let the embeddings be those of a run that was killed while it moved its files to their places."""
    folder = place.work / _EMBEDDINGS
    for digits in (16, 32):
        work = folder / f".embed-{('0123456789abcdef' * 2)[:digits]}"
        work.mkdir()
        shutil.copy(folder / "embed.json", work)
        for name, content in files.items():
            path = work / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    (folder / "embed.json").unlink()
    return folder


def test_a_complete_work_folder_is_not_moved_through_a_link(place: Place, before: Path) -> None:
    fill(place, before / "balance")
    folder = leave_complete(place, img_emb__authorized_keys=b"ssh-ed25519 AAAA attacker\n", img_emb__new=b"x")
    shutil.rmtree(folder / "img_emb")
    (folder / "img_emb").symlink_to(place.home / ".ssh")
    outcome = place.run("embed", "data", "--model", "model")
    assert not outcome.problems(), outcome


def test_what_a_sidecar_lists_is_not_removed_through_a_link(place: Place, before: Path) -> None:
    """An output that is replaced loses the files that the old sidecar lists."""
    fill(place, before / "cluster")
    folder = place.work / "clipcid-work/balance"
    (folder / "link").symlink_to(place.home / ".ssh")
    away = (
        "link/authorized_keys",
        "../../../home/.bashrc",
        str(place.home / ".profile"),
        "a/../../../../home/.gitconfig",
    )
    records = [{"path": path, "size": 1, "hash": "blake2b:0"} for path in away]
    edit_sidecar(folder / "balance.json", lambda sidecar: sidecar["outputs"].extend(records))
    outcome = place.run("balance", "--keep", "0.6", "--overwrite")
    assert not outcome.problems(), outcome


def test_pictures_of_a_report_are_those_of_the_data(place: Place, before: Path) -> None:
    """The sidecar of an evaluation names the places of example images, and a report shows them."""
    fill(place, before / "eval-linear")
    (sidecar,) = (place.work / "clipcid-work/eval/sidecars").glob("*model*.json")
    fifo = place.work / "fifo.png"
    os.mkfifo(fifo)

    def change(content: dict[str, list[dict[str, object]]]) -> None:
        for index, example in enumerate(content["examples"]):
            example |= {"path": str(fifo if index else place.private), "offset": 0, "size": 400 if index else None}

    edit_sidecar(sidecar, change)
    outcome = place.run(*_STEPS["eval-zeroshot"])
    assert not outcome.problems(), outcome


def test_caches_are_the_users_own_whatever_the_umask(place: Place, before: Path) -> None:
    fill(place, before / "embed")
    outcome = place.run(*_STEPS["embed"], umask=0)
    assert not outcome.problems(), outcome
    outcome = place.run(*_STEPS["balance"], umask=0)
    assert not outcome.problems(), outcome
    data = f"pipe:cat {place.work}/data/00000.tar"
    words = ("distill", data, "--teacher", "model", "--student", "student.json", "--preset", "clip-kd", *_SHORT)
    outcome = place.run(*words, "--work", "piped", umask=0, commands=[data[5:]])
    assert not outcome.problems(), outcome
    folders = [place.cache, *(path for path in place.cache.rglob("*") if path.is_dir())]
    open_ones = [path for path in folders if path.exists() and stat.S_IMODE(path.stat().st_mode) & 0o077]
    assert place.cache.exists(), outcome
    assert not open_ones, outcome


def test_what_is_finished_is_flushed_with_its_folder(place: Place, before: Path) -> None:
    """After the sidecar has its name, the folder that holds the name is flushed."""
    fill(place, before / "embed")
    outcome = place.run(*_STEPS["embed"])
    assert not outcome.problems(), outcome
    sidecar = str(place.work / _EMBEDDINGS / "embed.json")
    names = [event for event in outcome.events if event["event"] in ("rename", "fsync")]
    last = max(index for index, event in enumerate(names) if event["event"] == "rename" and event["what"][1] == sidecar)
    flushed = [event["what"] for event in names[last:] if event["event"] == "fsync"]
    assert str(place.work / _EMBEDDINGS) in flushed, flushed


def test_files_of_equal_size_and_time_that_are_swapped_are_other_data(place: Place, tiny_model: Path) -> None:
    """Reproducible archives all have the time 0."""
    for index in range(2):
        write_tar(place.data / f"{index}.tar", shard_members(4 * index, 4, captions=False))
    size = max((place.data / f"{index}.tar").stat().st_size for index in range(2))
    for index in range(2):
        path = place.data / f"{index}.tar"
        path.write_bytes(path.read_bytes().ljust(size, b"\0"))
        os.utime(path, ns=(0, 0))
    words = ("embed", place.data, "--model", tiny_model, "--no-text", "--json")
    assert not place.run(*words).problems()
    rows = place.work / "clipcid-work/embeddings/tiny/img_emb/img_emb_0000.npy"
    first = rows.read_bytes()
    (place.data / "0.tar").rename(place.data / "2")
    (place.data / "1.tar").rename(place.data / "0.tar")
    (place.data / "2").rename(place.data / "1.tar")
    outcome = place.run(*words)
    assert not outcome.problems(), outcome
    assert outcome.run.returncode == 1 or rows.read_bytes() != first, outcome


def test_identities_of_outputs_are_of_128_bits(place: Place, before: Path) -> None:
    fill(place, before / "embed")
    outcome = place.run(*_STEPS["embed"])
    folders = {Path(path).name for path in outcome.notes("made a folder") if Path(path).name.startswith(".embed-")}
    assert folders, outcome
    assert all(len(name) == len(".embed-") + 32 for name in folders), folders
