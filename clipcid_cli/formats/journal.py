"""The parts of an output that are done so far, so that a killed run continues with the others.

A part is one file, which appears whole when the part is done. A file that is torn, damaged or edited counts as missing.
Any number of processes may append parts of different names to one folder.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Generic, TypeVar

import msgspec

from clipcid_cli.formats.files import LARGEST_TEXT, read_regular, write_json
from clipcid_cli.formats.sidecar import seal

Part = TypeVar("Part")
Record = TypeVar("Record", bound=msgspec.Struct)


@dataclasses.dataclass(frozen=True)
class Journal(Generic[Part]):
    """Files of one form in a folder, which need not exist."""

    folder: Path
    suffix: str
    write: Callable[[Path, Part], None]  # whole or not at all
    load: Callable[[Path], Part | None]  # None for a file that is missing or damaged

    def path(self, name: str) -> Path:
        return self.folder / f"{name}{self.suffix}"

    def append(self, name: str, part: Part) -> None:
        """Record that a part is done."""
        self.write(self.path(name), part)

    def read(self, name: str) -> Part | None:
        """Return a part; None where it is not done."""
        return self.load(self.path(name))

    def forget(self, name: str) -> None:
        """Let a part be undone, before its files are written again."""
        self.path(name).unlink(missing_ok=True)

    def parts(self) -> Iterator[tuple[str, Part]]:
        """Yield name and content of each part that is done, in the order of names."""
        for path in sorted(self.folder.glob(f"[!.]*{self.suffix}")):
            part = self.load(path)
            if part is not None:
                yield path.name.removesuffix(self.suffix), part


def record_journal(folder: Path, kind: type[Record]) -> Journal[Record]:
    """Return the journal of parts with files of their own, each followed by a record in JSON."""

    def write(path: Path, record: Record) -> None:
        write_json(path, seal(msgspec.to_builtins(record)))

    def load(path: Path) -> Record | None:
        with suppress(OSError):  # missing
            return parse_record(read_regular(path, LARGEST_TEXT), kind)
        return None

    return Journal(folder, ".json", write, load)


def parse_record(content: bytes, kind: type[Record]) -> Record | None:
    """Return the record in a file of `record_journal`; None where it is damaged or was edited."""
    with suppress(ValueError, AttributeError, RecursionError, msgspec.ValidationError):
        entries = json.loads(content)
        if entries.get("checksum") == seal(entries)["checksum"]:
            return msgspec.convert(entries, kind)
    return None
