"""How `embed` writes a folder of embeddings: shard by shard, each followed by a record, and at the end the manifest of all.

    .embed-<identity>/                      unfinished embeddings of these settings and this data
        .run.json                           settings and data
        img_emb/img_emb_0003.npy            the rows of a shard; other kinds and metadata likewise
        .shards/0003.skipped.parquet        its samples that were left out
        .shards/0003.json                   its record, written after its files
        .parts/2-of-8.json                  where it is made in parts: what a part knows that the sidecar of all will say
        .parts/2-of-8.lock                  held while the part runs, in a folder

Whether a shard is finished is decided by `EmbeddingWriter.finished_record` alone: its record is there, of these settings and
keys, and of the files as they are. Several processes may write different shards of a folder at once.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats import fingerprint
from clipcid_cli.formats.data.samples import natural_key
from clipcid_cli.formats.embeddings.kinds import COUNTS_COLUMN, METADATA, Kind
from clipcid_cli.formats.embeddings.manifest import MANIFEST, ShardRecord, Skipped
from clipcid_cli.formats.files import (
    reading,
    write_error,
    write_npy,
    write_parquet,
)
from clipcid_cli.formats.fingerprint import FileRecord, find_changed, identity_of
from clipcid_cli.formats.journal import record_journal
from clipcid_cli.formats.output import find_works
from clipcid_cli.formats.skipped import SKIPPED, read_shards, read_skipped, write_listed, write_skipped
from clipcid_cli.formats.skips import Skips

# Records of finished shards, until all are finished.
_RECORDS = ".shards"
FINISHED = f"{_RECORDS}/*.json"
"""Pattern of these records in a work folder."""

_TEXT = pa.string()
_NUMBER = pa.int64()
_INPUT = pa.struct([("shard", _TEXT), ("path", _TEXT), ("size", _NUMBER), ("hash", _TEXT)])
_SKIPPED = pa.list_(pa.struct([("reason", _TEXT), ("count", _NUMBER), ("examples", pa.list_(_TEXT))]))
_FILE = pa.struct([("path", _TEXT), ("size", _NUMBER), ("time", _NUMBER), ("hash", _TEXT)])


@dataclasses.dataclass
class ShardRows:
    """What was made of a shard: n rows of each kind."""

    read: int  # samples listed, usable or not
    skipped: Skips
    adapted: Mapping[str, int]  # how many images were not shown as they are stored: `laid_on_white`, `from_16_bit`
    keys: Sequence[str]
    captions: Sequence[str]  # the first of each sample, empty where there is none
    counts: Sequence[int] | None  # numbers of captions; None where no sample has several
    rows: dict[Kind, npt.NDArray[Any]]


class EmbeddingWriter:
    """Writer of the shards of one folder, each followed by its record."""

    def __init__(
        self, folder: Path, settings: dict[str, Any], inputs: Sequence[FileRecord], keys: str = "sample"
    ) -> None:
        """Prepare to write shards, whose rows these settings decide; `keys` are as of `ShardRecord`."""
        self.folder = folder
        self._keys = keys
        self._inputs = inputs
        self._identities = [identity_of(settings, [shard]) for shard in inputs]
        self._journal = record_journal(folder / _RECORDS, ShardRecord)
        self._digits = max(4, len(str(len(inputs) - 1)))

    def write(self, index: int, shard: ShardRows) -> None:
        """Write a shard, with its metadata where it has images; the first has number 0."""
        # The record of another run must never accompany rows of this one, even if it is killed in between.
        self._journal.forget(self._label(index))
        write_listed(self._skipped_path(index), shard.skipped.listed)
        for kind in Kind:
            if kind in shard.rows:
                write_npy(self._path(kind, index), shard.rows[kind])
            else:
                self._path(kind, index).unlink(missing_ok=True)
        given = self._inputs[index]
        kinds: list[str] = [*shard.rows]
        if Kind.IMAGES in shard.rows:
            write_parquet(self._path(METADATA, index), _make_metadata(str(given.shard), shard))
            kinds.append(METADATA)
        skipped = [
            Skipped(reason, count, [_printable(name) for name in shard.skipped.examples.get(reason, [])])
            for reason, count in sorted(shard.skipped.counts.items())
        ]
        record = ShardRecord(
            input=msgspec.structs.replace(given, path=_printable(given.path)),
            identity=self._identities[index],
            read=shard.read,
            rows=len(shard.keys),
            **shard.adapted,
            skipped=skipped,
            files={kind: fingerprint.record(self._path(kind, index), self.folder) for kind in kinds},
            keys=self._keys,
            without_caption=shard.skipped.without,
            captions=shard.skipped.changed,
            listed=self._record_skipped(index) if skipped else None,
        )
        self._journal.append(self._label(index), record)

    def finished_record(self, index: int) -> ShardRecord | None:
        """Return the record of a shard; None where it is not finished by these settings, or a file was changed since."""
        record = self._record_of_any_keys(index)
        return record if record is not None and record.keys == self._keys else None

    def _record_of_any_keys(self, index: int) -> ShardRecord | None:
        """Return the record of a shard that is finished but for the form of its keys, which `rename_keys` changes."""
        record = self._journal.read(self._label(index))
        if record is None or record.identity != self._identities[index] or not record.is_listed:
            return None
        files = [*record.files.values(), *filter(None, [record.listed])]
        changed = find_changed(self.folder, files, self._journal.path(self._label(index)))
        return record if changed is None else None

    def take(self, folder: Path, records: Sequence[ShardRecord]) -> None:
        """Take over the shards of a finished folder, whatever their numbers there, whose files are those it records."""
        there = {record.identity: record for record in records}
        indexes = {str(given.shard): index for index, given in enumerate(self._inputs)}
        for shard, listed in read_shards(folder / SKIPPED):
            index = indexes.get(shard, -1)
            if index >= 0 and self._identities[index] in there and self._record_of_any_keys(index) is None:
                write_skipped(self._skipped_path(index), [listed])
        for index, identity in enumerate(self._identities):
            earlier = there.get(identity)
            if earlier is None or self._record_of_any_keys(index) is not None:
                continue
            if earlier.skipped and not self._skipped_path(index).exists():  # it does not say which
                continue
            if find_changed(folder, earlier.files.values(), folder / MANIFEST) is not None:
                continue
            self._journal.forget(self._label(index))  # one of another shard, before its files are replaced
            files: dict[str, FileRecord] = {}
            for kind, file in earlier.files.items():
                _link(folder / file.path, self._path(kind, index))
                files[kind] = msgspec.structs.replace(file, path=self._name(kind, index))
            listed = self._record_skipped(index) if earlier.skipped else None
            self._journal.append(self._label(index), msgspec.structs.replace(earlier, files=files, listed=listed))

    def estimate_done(self, earlier: Sequence[ShardRecord]) -> list[int]:
        """Return the shards that a plan need not count: those finished here, or that an `earlier` folder says it has."""
        there = {record.identity for record in earlier}
        return [
            index
            for index, identity in enumerate(self._identities)
            if identity in there or self._record_of_any_keys(index) is not None
        ]

    def names(self, index: int, record: ShardRecord) -> list[str]:
        """Name the files of a shard, relative to the folder: its record is the last."""
        kinds = [kind for kind in (*Kind, METADATA) if kind in record.files]
        listed = [self._skipped_path(index)] if record.skipped else []
        paths = [*(self._path(kind, index) for kind in kinds), *listed, self._journal.path(self._label(index))]
        return [str(path.relative_to(self.folder)) for path in paths]

    def accepts(self, index: int, record: ShardRecord) -> bool:
        """Tell whether a record is one of this shard, as these settings make it."""
        is_ours = record.identity == self._identities[index] and record.keys == self._keys
        return record.is_listed and is_ours and self.holds(index, record)

    def holds(self, index: int, record: ShardRecord) -> bool:
        """Tell whether a record has rows and names files of its shard alone, as one that was edited need not."""
        paths = {kind: file.path for kind, file in record.files.items()}
        own = {kind: self._name(kind, index) for kind in (*Kind, METADATA) if kind in paths}
        return {Kind.IMAGES, METADATA} <= paths.keys() and paths == own

    def record_shard(self, index: int, record: ShardRecord) -> None:
        """Record that a shard is finished whose files are in their places."""
        self._journal.append(self._label(index), record)

    def rename_keys(self) -> None:
        """Give shards that are finished with keys of the other kind those of this plan; their rows stay.

        Where it is killed on the way, the shard is written again, since its record is of other metadata.
        """
        for index in range(len(self._inputs)):
            record = self._record_of_any_keys(index)
            if record is None or record.keys == self._keys:
                continue
            prefix = f"{record.input.shard}/"
            files = dict(record.files)
            if METADATA in files:
                path = self._path(METADATA, index)
                with reading(path, "metadata of embeddings", "Embed again.") as file:
                    metadata = pq.read_table(file)
                write_parquet(path, self._rename(metadata, prefix))
                files[METADATA] = fingerprint.record(path, self.folder)
            listed = None
            if record.skipped:
                path = self._skipped_path(index)
                write_skipped(path, [self._rename(pa.concat_tables(read_skipped(path)), prefix)])
                listed = self._record_skipped(index)
            renamed = msgspec.structs.replace(record, files=files, keys=self._keys, listed=listed)
            self._journal.append(self._label(index), renamed)

    def _rename(self, table: pa.Table, prefix: str) -> pa.Table:
        keys = table["key"]
        if self._keys == "shard":
            renamed = pc.binary_join_element_wise(prefix, keys, "")
        else:
            renamed = pc.utf8_slice_codeunits(keys, len(prefix))
        return table.set_column(table.column_names.index("key"), "key", renamed)

    def finish(self) -> list[ShardRecord]:
        """Write the manifest and the list of skipped samples once all shards are finished; return the manifest."""
        finished = list[ShardRecord]()
        for index in range(len(self._inputs)):
            record = self.finished_record(index)
            assert record is not None, "every shard was written by one of the processes"
            finished.append(record)
        self._join_skipped(finished)
        written = set[str]().union(*(record.files for record in finished))
        kinds = [kind for kind in (*Kind, METADATA) if kind in written]
        schema = pa.schema(
            {
                "input": _INPUT,
                "identity": _TEXT,
                **dict.fromkeys(("read", "rows", "laid_on_white", "from_16_bit"), _NUMBER),
                "keys": _TEXT,
                "skipped": _SKIPPED,
                "files": pa.struct([(kind, _FILE) for kind in kinds]),
            }
        )
        write_parquet(self.folder / MANIFEST, pa.Table.from_pylist(msgspec.to_builtins(finished), schema))
        return finished

    def _join_skipped(self, finished: Sequence[ShardRecord]) -> None:
        """Write the list of the skipped samples of all shards."""
        paths = [self._skipped_path(index) for index, record in enumerate(finished) if record.skipped]
        if paths:
            write_skipped(self.folder / SKIPPED, chain.from_iterable(map(read_skipped, paths)))
        else:
            (self.folder / SKIPPED).unlink(missing_ok=True)

    def _skipped_path(self, index: int) -> Path:
        return self._journal.folder / f"{self._label(index)}.{SKIPPED}"

    def _record_skipped(self, index: int) -> FileRecord:
        return fingerprint.record(self._skipped_path(index), self.folder)

    def _label(self, index: int) -> str:
        return f"{index:0{self._digits}d}"

    def _path(self, kind: str, index: int) -> Path:
        return self.folder / self._name(kind, index)

    def _name(self, kind: str, index: int) -> str:
        form = "parquet" if kind == METADATA else "npy"
        return f"{kind}/{kind}_{self._label(index)}.{form}"


def _make_metadata(shard: str, rows: ShardRows) -> pa.Table:
    try:
        columns = {
            "key": pa.array(rows.keys, pa.string()),
            "shard": pa.array([shard] * len(rows.keys), pa.string()),
            "caption": pa.array(rows.captions, pa.string()),
        }
    except UnicodeEncodeError as error:
        raise ClipcidError(
            f"Shard {shard}: the name of a file is not UTF-8: {ascii(error.object)[1:-1]}.",
            "Rename the file; keys and names of shards are text.",
        ) from error
    if rows.counts is not None:
        columns[COUNTS_COLUMN] = pa.array(rows.counts, pa.int32())
    return pa.table(columns)


def read_unfinished(folder: Path, step: str) -> list[FileRecord]:
    """Return the shards that an unfinished run of a folder has embedded, in order, whatever its settings are."""
    journals = (record_journal(work / _RECORDS, ShardRecord) for work in find_works(folder, step))
    records = [named for journal in journals for named in journal.entries()]
    return [record.input for _, record in sorted(records, key=lambda named: natural_key(named[0]))]


def read_finished(work: Path) -> dict[int, ShardRecord]:
    """Return the records of the finished shards in a work folder, by the shards' numbers."""
    records = record_journal(work / _RECORDS, ShardRecord).entries()
    return {int(name): record for name, record in records if name.isdecimal()}


def _printable(name: str) -> str:
    """Return a name without letters that stand for bytes that are not UTF-8, as those of files may have."""
    return name.encode("utf-8", "backslashreplace").decode()


def _link(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it with its time where the file system has no links."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        try:
            os.link(source, target)
        except OSError:
            shutil.copy2(source, target)
    except OSError as error:
        raise write_error(target, error) from error
