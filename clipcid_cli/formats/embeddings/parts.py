"""Parts of embeddings: shards that processes which do not know of one another write to one folder or object store.

    .embed-<identity>/             what unfinished embeddings of these settings and this data have anyway
        .run.json                  settings and data
        .shards/0003.json          the record of a shard, written after its files
        .parts/2-of-8.json         what a part knows that the sidecar of all will say
        .parts/2-of-8.lock         held while the part runs, in a folder

In an object store names and order are the same, so that what was fetched from there is unfinished work in a folder, of which
no shard is missing. What a store holds is a stranger's: names are made here, sizes are bounded, contents are compared with
the hashes of records, and those with the identities that settings and data give.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from clipcid_cli.errors import ClipcidError, TooManyBytesError
from clipcid_cli.formats import fingerprint
from clipcid_cli.formats.data.object_store import ObjectStore
from clipcid_cli.formats.embeddings.manifest import ShardRecord
from clipcid_cli.formats.embeddings.sidecar import EmbedFacts
from clipcid_cli.formats.embeddings.writer import FINISHED, EmbeddingWriter, ShardRows
from clipcid_cli.formats.files import lock, write_error
from clipcid_cli.formats.fingerprint import FileRecord, identity_of
from clipcid_cli.formats.journal import Journal, record_journal
from clipcid_cli.formats.output import RUN_FILE, find_differences, list_differences
from clipcid_cli.formats.sidecar import Run

PARTS = ".parts"
_RECORDS = str(Path(FINISHED).parent)
_WORK = re.compile(r"\.embed-[0-9a-f]{32}")
_RECORD_NAME = re.compile(r"(\d{1,12})\.json")
_PART_NAME = re.compile(r"\d{1,12}-of-\d{1,12}\.json")
_LARGEST_RECORD = 2**20  # bytes; those of a shard or a part have some thousands
_THREADS = 16  # that wait for the store
_MISSING_LOOKED_AT = 2**20  # shards, to name the parts that they are of

Record = TypeVar("Record", bound=msgspec.Struct)


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of so many: it has the shards whose number is `index` modulo `count`."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @property
    def label(self) -> str:
        return f"{self.index}-of-{self.count}"

    def shards(self, total: int) -> range:
        return range(total)[self.index :: self.count]


class PartRecord(msgspec.Struct, kw_only=True):
    """What is recorded of a part when it begins and when it ends."""

    index: int
    count: int
    shards: int  # of all parts
    facts: EmbedFacts
    deciding: dict[str, Any]  # the settings that decide the rows of a shard
    timings: list[dict[str, int | float]] = []  # of each process of its last run; none before its end


def part_journal(work: Path) -> Journal[PartRecord]:
    """Return the journal of the parts in a work folder."""
    return record_journal(work / PARTS, PartRecord)


@contextmanager
def hold_part(work: Path, part: Part) -> Iterator[None]:
    """Hold a part of a work folder; one that another process holds is refused."""
    path = work / PARTS / f"{part.label}.lock"
    with ExitStack() as stack:
        try:
            path.parent.mkdir(exist_ok=True)
            stack.enter_context(lock(path, wait=False))
        except BlockingIOError as error:
            raise _running_error(work, str(part)) from error
        except OSError as error:
            raise write_error(path, error) from error
        yield
        path.unlink(missing_ok=True)


def refuse_running(work: Path) -> None:
    """Refuse to finish a work folder while a part is written to it."""
    for path in (work / PARTS).glob("*.lock"):
        try:
            with lock(path, wait=False):
                path.unlink(missing_ok=True)
        except BlockingIOError as error:
            raise _running_error(work, path.stem.replace("-of-", "/")) from error


def _running_error(work: Path, part: str) -> ClipcidError:
    return ClipcidError(
        f"Part {part} of {work.parent} is being embedded by another process.", "Wait for it, or stop it."
    )


class SendingWriter(EmbeddingWriter):
    """Writer of shards that are sent to an object store, the record of each last; here nothing stays."""

    def __init__(self, store: ObjectStore, own: range, *arguments: Any) -> None:
        """Prepare to send the shards `own`; the other arguments are those of an `EmbeddingWriter`."""
        super().__init__(*arguments)
        self._store = store
        self._own = own

    def write(self, index: int, shard: ShardRows) -> None:
        super().write(index, shard)
        record = super().read_record(index)
        assert record is not None, "it was just written"
        for name in self.names(index, record):
            self._store.send(self.folder / name, name)
            (self.folder / name).unlink()

    def read_record(self, index: int) -> ShardRecord | None:
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
    read = partial(_read, store.below(_RECORDS), kind=ShardRecord)
    with ThreadPoolExecutor(_THREADS) as pool:
        records = pool.map(read, [names[index] for index in indexes])
        return {index: record for index, record in zip(indexes, records, strict=True) if record is not None}


def read_sent_parts(store: ObjectStore) -> list[PartRecord]:
    """Read the records of the parts in a store."""
    names = sorted(filter(_PART_NAME.fullmatch, store.below(PARTS).names()))
    with ThreadPoolExecutor(_THREADS) as pool:
        records = pool.map(partial(_read, store.below(PARTS), kind=PartRecord), names)
        return [record for record in records if record is not None]


def _read(store: ObjectStore, name: str, kind: type[Record]) -> Record | None:
    try:
        return msgspec.json.decode(store.read(name, _LARGEST_RECORD), type=kind)
    except (msgspec.DecodeError, TooManyBytesError):
        return None


def read_runs(store: ObjectStore) -> dict[str, Run]:
    """Read settings and data of the embeddings whose parts are in a store, by the names of their folders there."""
    runs = dict[str, Run]()
    for name in sorted(filter(_WORK.fullmatch, store.names())):
        run = _read(store.below(name), RUN_FILE, Run)
        if run is not None and name == f".embed-{identity_of(run.settings, run.inputs)}":
            runs[name] = run
    return runs


def validate_same(store: ObjectStore, work: str, run: Run) -> None:
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
    missing = [index for index in range(len(records)) if writer.read_record(index) is None]
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
    if not writer.accepts(index, record) or {file.path for file in files} != set(names):
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
    writer.record_shard(index, msgspec.structs.replace(record, files=files_here))


def _edited_error(store: ObjectStore, record: str, problem: str) -> ClipcidError:
    return ClipcidError(problem, f"Remove {store}/{record}, then run the part of that shard again.")


def validate_complete(place: str, parts: Sequence[PartRecord], records: dict[int, ShardRecord], run: Run) -> None:
    """Refuse parts that do not agree, of which some are missing, or whose shards are not the data that was recorded."""
    if not parts:
        raise ClipcidError(f"{place} has no record of a part.", "Run the parts first: clipcid embed DATA --part I/N")
    shards = sorted({part.shards for part in parts})
    if len(shards) > 1:
        raise ClipcidError(
            f"The parts in {place} are of {shards[0]:,} and of {shards[1]:,} shards.",
            "Run all parts on the same data, to another --out.",
        )
    total = shards[0]
    lacking = (index for index in range(total) if index not in records)
    missing = list(islice(lacking, _MISSING_LOOKED_AT))
    if missing:
        count = max(part.count for part in parts)
        of = [str(Part(index, count)) for index in sorted({shard % max(1, count) for shard in missing})]
        named = ", ".join(of[:8]) + (f" and {len(of) - 8} more" if len(of) > 8 else "")
        raise ClipcidError(
            f"{total - len(records):,} of {total:,} shards are missing in {place}, of "
            f"{'part' if len(of) == 1 else 'parts'} {named}.",
            f"Run {'it' if len(of) == 1 else 'them'} again: clipcid embed DATA --part {of[0]} …",
        )
    together = fingerprint.record_together("", [records[index].input for index in range(total)])
    if len(records) != total or [file.content for file in run.inputs] != [together.content]:
        raise ClipcidError(
            f"The {len(records):,} shards in {place} are not those of the data, of {total:,} shards: they have "
            f"{together.size:,} bytes, the data {sum(file.size for file in run.inputs):,}.",
            "Embed again to another --out.",
        )
