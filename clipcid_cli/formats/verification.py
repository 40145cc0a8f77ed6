"""Whether the files of outputs are what their sidecars say; nothing is changed, and nothing is read outside their folder.

A sidecar may be anybody's: a path that leaves the output, lexically or by a link, is a fault.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import msgspec

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.embeddings.sidecar import EmbedSidecar
from clipcid_cli.formats.files import describe, open_regular
from clipcid_cli.formats.fingerprint import FileRecord, record
from clipcid_cli.formats.sidecar import Sidecar, read_sidecar

_STEPS = ("embed", "balance", "forest", "cluster", "repair", "distill", "export", "write-shards", "matched")
_OF_EVALUATIONS = "sidecars"  # the folder of sidecars whose files are in the one above
_UNFINISHED = re.compile(r"\.[a-z].*-([0-9a-f]{16}|[0-9a-f]{32})")
_CHECKSUM = b'"checksum": "blake2b'
_TAIL = 256  # bytes, in which a sidecar has its checksum
_FIX = "Make the output again with --overwrite, or restore its files."


class Fault(msgspec.Struct, frozen=True):
    """What is wrong with one file."""

    path: str
    problem: str


class FolderContents(msgspec.Struct):
    """What a folder holds: sidecars, the folders of unfinished runs, and links that are not followed."""

    sidecars: list[Path] = []
    unfinished: list[Path] = []
    faults: list[Fault] = []


class RecordedFile(msgspec.Struct, frozen=True):
    """A file as a sidecar records it."""

    sidecar: Path
    record: FileRecord

    @property
    def path(self) -> Path:
        return Path(os.path.normpath(self.sidecar.parent / self.record.path))


def find_outputs(root: Path) -> FolderContents:
    """Look for outputs in a folder and all below it."""
    outputs = FolderContents()

    def note_unread(error: OSError) -> None:
        outputs.faults.append(Fault(str(error.filename), f"cannot be read: {describe(error)}"))

    for name, folders, files in os.walk(root, onerror=note_unread):
        here = Path(name)
        links = [folder for folder in folders if (here / folder).is_symlink()]
        for link in links:
            if not _is_inside(here / link, root):
                outputs.faults.append(Fault(str(here / link), "is a link out of the folder, and was not followed"))
        outputs.unfinished += [here / folder for folder in sorted(folders) if _UNFINISHED.fullmatch(folder)]
        folders[:] = sorted(folder for folder in folders if folder not in links and not folder.startswith("."))
        outputs.sidecars += [
            here / file for file in sorted(files) if file.endswith(".json") and _is_sidecar(here / file)
        ]
    return outputs


def _is_sidecar(path: Path) -> bool:
    """Tell whether a file is a sidecar, perhaps a damaged one: by its name, or by its last entry."""
    if path.stem in _STEPS or path.parent.name == _OF_EVALUATIONS:
        return True
    try:
        with open_regular(path) as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL))
            return _CHECKSUM in file.read(_TAIL)
    except OSError:
        return False


def _is_inside(path: Path, root: Path) -> bool:
    return path.resolve().is_relative_to(root.resolve())


def read_output(path: Path, root: Path) -> list[RecordedFile]:
    """Read the sidecar of an output, and return the files that it records, those of a manifest too."""
    if not _is_inside(path, root):
        raise ClipcidError("is a link out of the folder, and was not followed")
    sidecar = read_sidecar(path, Sidecar, _FIX)
    if sidecar is None:
        raise ClipcidError("is a link that leads nowhere")
    files = [RecordedFile(path, file) for file in sidecar.outputs]
    if sidecar.step == "embed" and all(find_problem(file, root) is None for file in files):
        if not _is_inside(path.parent / "manifest.parquet", root):
            raise ClipcidError("has a manifest that is a link out of the folder, and was not followed")
        rows = read_sidecar(path, EmbedSidecar, _FIX)
        assert rows is not None
        files = [RecordedFile(path, file) for file in rows.records(path.parent)]
    return files


def find_problem(file: RecordedFile, root: Path) -> str | None:
    """Compare a file with what is recorded of it; return what is wrong, or None."""
    recorded, folder = file.record, file.sidecar.parent
    top = folder.parent if folder.name == _OF_EVALUATIONS else folder
    try:
        if not file.path.is_relative_to(os.path.normpath(top)) or not _is_inside(file.path, root):
            return f"is outside the folder of {file.sidecar}, which names it, and was not read"
        now = record(file.path)
    except FileNotFoundError:
        return f"is missing, although {file.sidecar} says it was written"
    except (OSError, ValueError) as error:  # the latter of a name that is none
        return f"cannot be read: {describe(error)}"
    if now.size != recorded.size:
        return f"has {now.size:,} bytes; {recorded.size:,} were written"
    if now.hash != recorded.hash:
        return f"has other content than was written: {now.hash}, not {recorded.hash}"
    return None
