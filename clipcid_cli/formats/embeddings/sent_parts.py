"""Parts of embeddings in an object store, named and ordered as those in a folder, see `parts.py`.

What was fetched from there is unfinished work in a folder, of which no shard is missing. What a store holds is a stranger's:
names are made here, sizes are bounded, contents are compared with the hashes of records, and those with the identities that
settings and data give.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from clipcid_cli.errors import ClipcidError, TooManyBytesError
from clipcid_cli.formats import fingerprint
from clipcid_cli.formats.data.object_store import ObjectStore
from clipcid_cli.formats.embeddings.manifest import ShardRecord
from clipcid_cli.formats.embeddings.parts import PARTS, PartRecord
from clipcid_cli.formats.embeddings.writer import FINISHED, EmbeddingWriter, ShardRows
from clipcid_cli.formats.fingerprint import FileRecord, identity_of
from clipcid_cli.formats.journal import parse_record
from clipcid_cli.formats.output import RUN_FILE, find_differences, list_differences
from clipcid_cli.formats.sidecar import Provenance

_RECORDS = str(Path(FINISHED).parent)
_WORK = re.compile(r"\.embed-[0-9a-f]{32}")
_RECORD_NAME = re.compile(r"(\d{1,12})\.json")
_PART_NAME = re.compile(r"\d{1,12}-of-\d{1,12}\.json")
_LARGEST_RECORD = 2**20  # bytes; those of a shard or a part have some thousands
_THREADS = 16  # that wait for the store

Record = TypeVar("Record", bound=msgspec.Struct)


class SendingWriter(EmbeddingWriter):
    """Writer of shards that are sent to an object store, the record of each last; here nothing stays."""

    def __init__(self, store: ObjectStore, own: range, *arguments: Any) -> None:
        """Prepare to send the shards `own`; the other arguments are those of an `EmbeddingWriter`."""
        super().__init__(*arguments)
        self._store = store
        self._own = own

    def write(self, index: int, shard: ShardRows) -> None:
        super().write(index, shard)
        record = super().finished_record(index)
        assert record is not None, "it was just written"
        for name in self.names(index, record):
            self._store.send(self.folder / name, name)
            (self.folder / name).unlink()

    def finished_record(self, index: int) -> ShardRecord | None:
        return self._sent.get(index)

    @cached_property
    def _sent(self) -> dict[int, ShardRecord]:
        return read_sent(self._store, set(self._own))

    def forget_sent(self) -> None:
        """Ask the store anew which shards it has."""
        vars(self).pop("_sent", None)


def read_sent(store: ObjectStore, wanted: set[int] | None = None) -> dict[int, ShardRecord]:
    """Read the records of the shards in a store, by the shards' numbers; one that is damaged counts as missing."""
    names = {
        int(match[1]): match[0] for name in store.below(_RECORDS).names() if (match := _RECORD_NAME.fullmatch(name))
    }
    indexes = sorted(names if wanted is None else wanted & names.keys())
    read = partial(_read_record, store.below(_RECORDS), kind=ShardRecord)
    with ThreadPoolExecutor(_THREADS) as pool:
        records = pool.map(read, [names[index] for index in indexes])
        return {index: record for index, record in zip(indexes, records, strict=True) if record is not None}


def read_sent_parts(store: ObjectStore) -> list[PartRecord]:
    """Read the records of the parts in a store."""
    names = sorted(filter(_PART_NAME.fullmatch, store.below(PARTS).names()))
    with ThreadPoolExecutor(_THREADS) as pool:
        records = pool.map(partial(_read_record, store.below(PARTS), kind=PartRecord), names)
        return [record for record in records if record is not None]


def _read_record(store: ObjectStore, name: str, kind: type[Record]) -> Record | None:
    try:
        return parse_record(store.read(name, _LARGEST_RECORD), kind)
    except TooManyBytesError:
        return None


def _read_run(store: ObjectStore) -> Provenance | None:
    try:
        return msgspec.json.decode(store.read(RUN_FILE, _LARGEST_RECORD), type=Provenance)
    except (msgspec.DecodeError, TooManyBytesError):
        return None


def read_runs(store: ObjectStore) -> dict[str, Provenance]:
    """Read settings and data of the embeddings whose parts are in a store, by the names of their folders there."""
    runs = dict[str, Provenance]()
    for name in sorted(filter(_WORK.fullmatch, store.names())):
        run = _read_run(store.below(name))
        if run is not None and name == f".embed-{identity_of(run.settings, run.inputs)}":
            runs[name] = run
    return runs


def validate_same(store: ObjectStore, work: str, run: Provenance) -> None:
    """Refuse a store that has parts of other settings or other data."""
    for name, other in read_runs(store).items():
        if name != work:
            raise ClipcidError(
                f"{store} holds parts that were made with other settings or inputs:\n"
                + list_differences(find_differences(other, run)),
                f"Give all parts the same data, model and flags, choose another --out, or remove {store}/{name}.",
            )


def fetch_shards(store: ObjectStore, writer: EmbeddingWriter, records: Sequence[ShardRecord]) -> None:
    """Fetch the shards that the folder of a writer lacks; what is not as its record says is refused."""
    missing = [index for index in range(len(records)) if writer.finished_record(index) is None]
    size = sum(file.size for index in missing for file in records[index].files.values())
    free = shutil.disk_usage(writer.folder).free
    if size > free:
        raise ClipcidError(
            f"The embeddings in {store} have {size:,} bytes; {free:,} are free in {writer.folder.parent}.",
            "Free some space, or choose a folder on another disk with --out.",
        )
    with ThreadPoolExecutor(_THREADS) as pool:
        for _ in pool.map(lambda index: _fetch_shard(store, writer, index, records[index]), missing):
            pass


def _fetch_shard(store: ObjectStore, writer: EmbeddingWriter, index: int, record: ShardRecord) -> None:
    *names, own = writer.names(index, record)
    listed = [] if record.listed is None else [record.listed]
    files = [*record.files.values(), *listed]
    # A size below 0 would have a file read whole.
    is_whole = {file.path for file in files} == set(names) and all(file.size >= 0 for file in files)
    if not is_whole or not writer.accepts(index, record):
        raise _edited_error(store, own, f"{store}/{own} is not the record of shard {record.input.shard}.")
    for file in files:
        # One of the names above, which do not lead out of the folder.
        path = writer.folder / file.path
        store.fetch(file.path, path, file.size)
        if fingerprint.record(path).content[:2] != file.content[:2]:
            problem = (
                f"{store}/{file.path} has changed since its record was written: its {file.size:,} bytes are others."
            )
            raise _edited_error(store, own, problem)

    def here(file: FileRecord) -> FileRecord:
        return fingerprint.record(writer.folder / file.path, writer.folder)

    files_here = {part: here(file) for part, file in record.files.items()}
    listed_here = None if record.listed is None else here(record.listed)
    writer.record_shard(index, msgspec.structs.replace(record, files=files_here, listed=listed_here))


def _edited_error(store: ObjectStore, record: str, problem: str) -> ClipcidError:
    return ClipcidError(problem, f"Remove {store}/{record}, then run the part of that shard again.")
