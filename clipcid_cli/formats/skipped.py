"""``skipped.parquet``: every sample that a step skipped, by key, shard and reason; one shard in memory at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clipcid_cli.formats.files import atomic_file, reading
from clipcid_cli.formats.sidecar import Sidecar

SKIPPED = "skipped.parquet"
"""Name of the file beside an output."""

_COLUMNS = ("key", "shard", "reason")
_SCHEMA = pa.schema([(name, pa.string()) for name in _COLUMNS])
_ROWS_AT_ONCE = 2**16


def make_table(samples: Sequence[Sequence[str]]) -> pa.Table:
    """Return samples, (key, shard, reason) each, as a table; of names that are not UTF-8 the bytes are escaped."""
    rows = [[text.encode("utf-8", "backslashreplace").decode() for text in sample] for sample in samples]
    return pa.table([pa.array([row[place] for row in rows], pa.string()) for place in range(3)], schema=_SCHEMA)


def write_listed(path: Path, samples: Sequence[Sequence[str]]) -> bool:
    """Write samples as `make_table` takes them, and tell whether there was one; without one there is no file."""
    if samples:
        return write_skipped(path, [make_table(samples)])
    path.unlink(missing_ok=True)
    return False


def list_rows(keys: pa.Array, shards: pa.Array | str, reason: str) -> pa.Table:
    """Return the table of n samples of one reason; of one shard, where that is a name."""
    names = pa.repeat(shards, len(keys)) if isinstance(shards, str) else shards
    columns = [keys.cast(pa.string()), names.cast(pa.string()), pa.repeat(reason, len(keys)).cast(pa.string())]
    return pa.table(columns, schema=_SCHEMA)


def write_skipped(path: Path, tables: Iterable[pa.Table]) -> bool:
    """Write tables one after the other, and tell whether there was a row; without one there is no file."""
    pieces = (table for table in tables if len(table))
    first = next(pieces, None)
    if first is None:
        path.unlink(missing_ok=True)
        return False
    with atomic_file(path) as file, pq.ParquetWriter(file, first.schema, compression="zstd") as writer:
        pending = [first]
        for table in pieces:
            if sum(map(len, pending)) >= _ROWS_AT_ONCE:
                writer.write_table(pa.concat_tables(pending))
                pending = []
            pending.append(table)
        writer.write_table(pa.concat_tables(pending))
    return True


def skipped_file(sidecar: Sidecar, folder: Path) -> dict[str, str]:
    """Return the path of the file beside an output of a step, as ``skipped``, where its sidecar has one."""
    return {"skipped": str(folder / SKIPPED)} if any(file.path == SKIPPED for file in sidecar.outputs) else {}


def read_skipped(path: Path) -> Iterator[pa.Table]:
    """Yield the rows of a file, some at a time; none where there is no file."""
    if not path.exists():
        return
    with reading(path, "a list of skipped samples", "Make it again.") as file, pq.ParquetFile(file) as source:
        for batch in source.iter_batches(_ROWS_AT_ONCE):
            yield pa.Table.from_batches([batch])


def read_shards(path: Path) -> Iterator[tuple[str, pa.Table]]:
    """Yield the rows of each shard of a file that lists one shard after the other, with the shard's name."""
    held = list[pa.Table]()
    for table in read_skipped(path):
        rest = table
        while len(rest):
            name = rest["shard"][0].as_py()
            others = pc.indices_nonzero(pc.not_equal(rest["shard"], name))
            count = others[0].as_py() if len(others) else len(rest)
            if held and held[0]["shard"][0].as_py() != name:
                yield held[0]["shard"][0].as_py(), pa.concat_tables(held)
                held = []
            held.append(rest.slice(0, count))
            rest = rest.slice(count)
    if held:
        yield held[0]["shard"][0].as_py(), pa.concat_tables(held)
