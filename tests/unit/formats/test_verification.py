"""Which files of an output are not what its sidecar says; whatever a sidecar names, nothing outside is read."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sidecars import edit_sidecar

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.fingerprint import record
from clipcid_cli.formats.output import OutputSpec, open_output
from clipcid_cli.formats.sidecar import Sidecar
from clipcid_cli.formats.verification import find_outputs, find_problem, read_output


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A work directory with an output of two files, and the sidecar of an evaluation, whose file is in the folder above."""
    (tmp_path / "secret").write_text("mine")
    for folder, step, top, names in (
        ("balance", "balance", "balance", ["keep.parquet", "folder/part"]),
        ("eval/sidecars", "photos_model", "eval", ["../photos_model.json"]),
    ):
        place = tmp_path / "work" / folder
        spec = OutputSpec(place, step, Sidecar, settings={}, inputs=[], top=tmp_path / "work" / top)
        with open_output(spec) as output:
            output.begin_work()
            for name in names:
                (output.work / name).parent.mkdir(exist_ok=True)
                (output.work / name).write_text('{"acc1": 0.5}')
            outputs = [record(output.work / name, output.work) for name in names]
            output.commit(counts={}, seconds={}, outputs=outputs)
    return tmp_path / "work"


def problems(root: Path) -> dict[str, str]:
    """Return what is wrong, by path within the folder."""
    found = find_outputs(root)
    told = {fault.path: fault.problem for fault in found.faults}
    for sidecar in found.sidecars:
        try:
            told |= {
                str(file.path): problem
                for file in read_output(sidecar, root)
                if (problem := find_problem(file, root)) is not None
            }
        except ClipcidError as error:
            told[str(sidecar)] = error.message
    return {os.path.relpath(path, root): problem for path, problem in told.items()}


def test_files_as_they_were_written_have_no_fault(root: Path) -> None:
    assert problems(root) == {}
    assert [path.name for path in find_outputs(root).sidecars] == ["balance.json", "photos_model.json"]
    (root / "balance" / ".balance-0123456789abcdef").mkdir()
    assert [path.name for path in find_outputs(root).unfinished] == [".balance-0123456789abcdef"]
    assert problems(root) == {}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda path: path.write_text("longer than it was"), "has 18 bytes; 13 were written"),
        (lambda path: path.write_text('{"acc1": 0.6}'), "has other content than was written: blake2b:"),
        (Path.unlink, "is missing, although "),
        (lambda path: (path.unlink(), os.mkfifo(path)), "cannot be read: it is a pipe or device, not a file"),
        (lambda path: (path.unlink(), path.symlink_to("/etc/hostname")), "is outside the folder of "),
    ],
)
@pytest.mark.parametrize("name", ["balance/folder/part", "eval/photos_model.json"])
def test_each_file_that_differs_is_one_fault(
    root: Path, change: Callable[[Path], object], problem: str, name: str
) -> None:
    path = root / name
    before = path.stat()
    change(path)
    if path.is_file() and not path.is_symlink():
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # the same time proves nothing
    found = problems(root)
    assert found.keys() == {name}
    assert found[name].startswith(problem)


@pytest.mark.parametrize("name", ["../../secret", "/etc/hostname", "folder/../../../secret", "linked/secret", "a\0b"])
def test_a_file_that_a_sidecar_names_elsewhere_is_not_read(
    root: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "balance" / "linked").symlink_to(tmp_path)

    def rename(content: dict[str, Any]) -> None:
        content["outputs"][0]["path"] = name

    edit_sidecar(root / "balance" / "balance.json", rename)
    opened: list[str] = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, *more, **named: opened.append(str(path)) or real(path, *more, **named))
    told = set(problems(root).values())
    monkeypatch.undo()
    assert any("was not read" in each or "cannot be read" in each for each in told)
    assert [path for path in opened if "secret" in path or "hostname" in path] == []


@pytest.mark.parametrize("content", ["", "[]", '{"format_version": 1}', '{"tool": "clipcid", "format_version": 2}'])
def test_a_damaged_sidecar_is_a_fault_of_its_own(root: Path, content: str) -> None:
    (root / "balance" / "balance.json").write_text(content)
    assert problems(root).keys() == {"balance/balance.json"}


def test_a_linked_sidecar_or_folder_is_not_followed(root: Path, tmp_path: Path) -> None:
    (root / "balance" / "balance.json").rename(tmp_path / "balance.json")
    (root / "balance" / "balance.json").symlink_to(tmp_path / "balance.json")
    (root / "elsewhere").symlink_to(tmp_path)
    assert problems(root) == dict.fromkeys(
        ("balance/balance.json", "elsewhere"), "is a link out of the folder, and was not followed"
    )
