"""What is done of an output so far, so that a killed run continues with the rest.

An entry is one file, which appears whole when what it stands for is done. One that is torn, damaged or edited counts as
missing. Any number of processes may append entries of different names to one folder.
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

Entry = TypeVar("Entry")
Record = TypeVar("Record", bound=msgspec.Struct)


@dataclasses.dataclass(frozen=True)
class Journal(Generic[Entry]):
    """Files of one form in a folder, which need not exist."""

    folder: Path
    suffix: str
    write: Callable[[Path, Entry], None]  # whole or not at all
    load: Callable[[Path], Entry | None]  # None for a file that is missing or damaged

    def path(self, name: str) -> Path:
        return self.folder / f"{name}{self.suffix}"

    def append(self, name: str, entry: Entry) -> None:
        """Record what is done."""
        self.write(self.path(name), entry)

    def read(self, name: str) -> Entry | None:
        """Return an entry; None where there is none."""
        return self.load(self.path(name))

    def forget(self, name: str) -> None:
        """Remove an entry, before the files that it stands for are written again."""
        self.path(name).unlink(missing_ok=True)

    def entries(self) -> Iterator[tuple[str, Entry]]:
        """Yield the name and the content of each entry, in the order of names."""
        for path in sorted(self.folder.glob(f"[!.]*{self.suffix}")):
            entry = self.load(path)
            if entry is not None:
                yield path.name.removesuffix(self.suffix), entry


def record_journal(folder: Path, kind: type[Record]) -> Journal[Record]:
    """Return the journal of records in JSON, of which each stands for files that were written before it."""

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
        fields = json.loads(content)
        if fields.get("checksum") == seal(fields)["checksum"]:
            return msgspec.convert(fields, kind)
    return None
