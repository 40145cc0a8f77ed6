"""Rows of different files joined by key, and keys that repeat, at any scale: keys are compared, never hashes alone.

Files that the toolkit made of one another list their rows in one order, with some left out: they are read in step, ten
million keys a second, in memory of a fixed size. Files in another order are joined by DuckDB, three million keys a second,
within 1 GB; what exceeds that it keeps on the disk. No key becomes a Python object.
"""

from __future__ import annotations

import dataclasses
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.arrays import create_mapped
from clipcid_cli.formats.files import lock, reading, write_error
from clipcid_cli.formats.parquet import is_text, validate_expansion

Keys: TypeAlias = Callable[[], Iterable[pa.ChunkedArray]]
"""Starts reading a column of text, part by part; it may be called again."""
Values: TypeAlias = npt.NDArray[np.int64]

_MEMORY = "1GB"
_THREADS = 2
_SCRATCH = ".clipcid-join-"
_ROWS_AT_ONCE = 2**16
# So few keys are looked through by pyarrow: to import DuckDB and open a database takes 0.07 s.
_FEW = 2**20
# Fewer numbers are held in memory: 64 MiB.
_FEW_NUMBERS = 2**23


@dataclasses.dataclass(frozen=True)
class Listing:
    """A file, or files, that list keys with numbers ≥ 0 for each."""

    source: Path
    # Starts reading: n keys at a time, as text, with their numbers, int64 [n, k].
    read: Callable[[], Iterator[tuple[pa.Array, Values]]]
    width: int = 1  # k


class Repeat(NamedTuple):
    """A key that occurs twice, and its first two rows."""

    key: str
    first: int
    second: int


def parquet_listing(path: Path, value: str | None = None) -> Listing:
    """List the column ``key`` of a parquet file, with the number of each row, or with another column."""
    import pyarrow.parquet as pq  # data and embeddings only look for repeats

    def read() -> Iterator[tuple[pa.Array, Values]]:
        first = 0
        what = "a parquet file with a column key of text"
        with reading(path, what, "Make it again.") as source, pq.ParquetFile(path) as file:
            validate_expansion(file.metadata, source)
            if not is_text(kind := file.schema_arrow.field("key").type):
                raise TypeError(f"its keys are of type {kind}")
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=["key", *([value] if value else [])]):
                rows = np.arange(first, first + len(batch), dtype=np.int64)
                values = batch[value].to_numpy(zero_copy_only=False).astype(np.int64) if value else rows
                yield batch["key"], values[:, None]
                first += len(batch)

    return Listing(path, read)


def join(keys: Keys, count: int, listing: Listing, folder: Path | None) -> Values:
    """Look up keys: their numbers, int64 [N, k], in memory or mapped; −1 where a key is not listed.

    A key that the listing has twice is an error, one of its keys that is not looked up is not.

    Args:
        keys: N = `count` keys, all different; quickest where the listing has them in the same order, with some left out.
        folder: Where there is room, made where it is missing; None: the system's folder for temporary files. Nothing stays.
    """
    shape = count, listing.width
    if count * listing.width <= _FEW_NUMBERS:
        values: Values = np.empty(shape, np.int64)
    else:
        with _scratch_folder(folder) as scratch:  # the file has no name there, and stays mapped
            values = create_mapped(scratch, np.dtype(np.int64), shape, unnamed=True)
    if not _match_in_step(keys, values, listing):
        _match_in_any_order(keys, values, listing, folder)
    return values


def find_repeat(keys: Keys, folder: Path | None) -> Repeat | None:
    """Find a key that occurs twice, of several the first by its letters; None when all differ. `folder` is as for `join`."""
    if _are_few_and_different(keys):
        return None
    repeated = "SELECT key FROM listed GROUP BY key HAVING count(*) > 1"
    (answer,) = _query(f"SELECT min(key) AS key FROM ({repeated})", folder, listed=_number(keys))
    key = answer["key"][0]
    if not key.is_valid:
        return None
    rows = list[int]()
    first = 0
    for column in keys():
        is_it = pc.equal(_as_bytes(column), key).to_numpy()
        rows += (first + np.flatnonzero(is_it)).tolist()
        first += len(column)
    return Repeat(key.as_py().decode("utf-8", errors="replace"), rows[0], rows[1])


def _match_in_step(keys: Keys, values: Values, listing: Listing) -> bool:
    """Read keys and listing side by side; tell whether all that is listed was found, and once each."""
    chunks = ((chunk.cast(pa.large_string()), numbers) for chunk, numbers in listing.read() if len(chunk))
    end = pa.array([], pa.large_string()), np.empty((0, listing.width), np.int64)
    listed, numbers = next(chunks, end)
    first = 0
    for column in keys():
        sought = column.combine_chunks().cast(pa.large_string())
        part = values[first : first + len(sought)]
        part[:] = -1
        first += len(sought)
        matched = 0
        while len(listed) and matched < len(sought):
            ahead = listed.slice(0, len(sought) - matched)
            places = _find_run(ahead, sought)
            part[places] = numbers[: len(places)]
            matched += len(places)
            listed = listed.slice(len(places))
            numbers = numbers[len(places) :]
            if len(places) < len(ahead):
                break
            if not len(listed):
                listed, numbers = next(chunks, end)
        if np.count_nonzero(part[:, 0] >= 0) != matched:
            return False
    return not len(listed)


def _find_run(listed: pa.Array, sought: pa.Array) -> Values:
    """Return the places among `sought` of the listed keys that come before the first that is not there, int64 [n]."""
    if listed.equals(sought):
        return np.arange(len(sought))
    places: Values = pc.index_in(listed, value_set=sought).fill_null(-1).to_numpy()
    others = np.flatnonzero(places < 0)
    return places[: others[0]] if len(others) else places


def _match_in_any_order(keys: Keys, values: Values, listing: Listing, folder: Path | None) -> None:
    numbers = ", ".join(f"listed.number_{column} AS found_{column}" for column in range(listing.width))
    sql = f"SELECT sought.number_0 AS row, {numbers} FROM sought JOIN listed USING (key)"
    values[:] = -1
    pairs = 0
    for batch in _query(sql, folder, sought=_number(keys), listed=listing):
        rows, *columns = (column.to_numpy() for column in batch.columns)
        values[rows] = np.stack(columns, axis=1)
        pairs += len(batch)
    if pairs > np.count_nonzero(values[:, 0] >= 0):
        repeat = find_repeat(lambda: (pa.chunked_array([chunk]) for chunk, _ in listing.read()), folder)
        assert repeat is not None, "one key has two rows"
        raise ClipcidError(
            f"Key {repeat.key!r} occurs in row {repeat.first:,} and again in row {repeat.second:,} of {listing.source}.",
            "Keys must be unique: write the file again with --keys shard, or remove one of the rows.",
        )


def _query(sql: str, folder: Path | None, **tables: Listing) -> Iterator[pa.RecordBatch]:
    """Ask DuckDB about listings, by their names: tables of ``key`` (binary), ``number_0``, ``number_1`` and so on."""
    import duckdb  # 0.05 s, which joins in step should not wait for

    failures = list[BaseException]()  # of reading a listing: DuckDB gives only their text

    def feed(listing: Listing, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        try:
            for chunk, numbers in listing.read():
                yield pa.record_batch([_as_bytes(chunk), *map(pa.array, numbers.T)], schema=schema)
        except (Exception, KeyboardInterrupt) as error:
            failures.append(error)
            raise

    with _scratch_folder(folder) as scratch:
        settings: dict[str, Any] = {"memory_limit": _MEMORY, "threads": _THREADS, "preserve_insertion_order": False}
        try:
            with duckdb.connect(config=settings | {"temp_directory": str(scratch)}) as connection:
                for name, listing in tables.items():
                    columns = [(f"number_{column}", pa.int64()) for column in range(listing.width)]
                    schema = pa.schema([("key", pa.large_binary()), *columns])
                    connection.register(name, pa.RecordBatchReader.from_batches(schema, feed(listing, schema)))
                yield from pa.RecordBatchReader.from_stream(connection.sql(sql))
        except (duckdb.Error, pa.ArrowException, OSError) as error:
            if failures:
                raise failures[0] from None
            reason = str(error).partition("\n")[0].rstrip(".")  # advice about DuckDB's settings follows
            raise ClipcidError(
                f"Keys could not be joined in {scratch.parent}: {reason}.",
                "Free some space there, then run the same command again.",
            ) from error


def _number(keys: Keys) -> Listing:
    """List keys with their positions."""

    def read() -> Iterator[tuple[pa.Array, Values]]:
        first = 0
        for column in keys():
            for chunk in column.chunks:
                yield chunk, np.arange(first, first + len(chunk))[:, None]
                first += len(chunk)

    return Listing(Path(), read)


def _as_bytes(keys: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """Return keys as bytes, since they may not be UTF-8; those that are stored as numbers of a dictionary, in full."""
    return keys.cast(pa.large_string()).cast(pa.large_binary())


def _are_few_and_different(keys: Keys) -> bool:
    chunks = list[pa.Array]()
    rows = 0
    for column in keys():
        rows += len(column)
        if rows > _FEW:
            return False
        chunks += _as_bytes(column).chunks
    return bool(pc.count_distinct(pa.chunked_array(chunks, pa.large_binary())).as_py() == rows)


@contextmanager
def _scratch_folder(folder: Path | None) -> Iterator[Path]:
    """Make a folder for what memory does not hold, and a lock beside it; remove both, and those of killed runs."""
    place = folder or Path(tempfile.gettempdir())
    for left in place.glob(f"{_SCRATCH}*.lock"):
        with suppress(OSError), lock(left, wait=False):
            shutil.rmtree(left.with_suffix(""), ignore_errors=True)
            left.unlink()
    held = place / f"{_SCRATCH}{secrets.token_hex(4)}.lock"
    scratch = held.with_suffix("")
    with ExitStack() as stack:
        try:
            if not place.exists():
                place.mkdir(parents=True)
                stack.callback(_remove_if_empty, place)  # a list of other data leaves nothing
            stack.enter_context(lock(held))
            stack.callback(held.unlink, missing_ok=True)
            # Over NFS a mapped file stays until it is closed.
            stack.callback(shutil.rmtree, scratch, ignore_errors=True)
            scratch.mkdir(mode=0o700)
        except OSError as error:
            raise write_error(place, error) from error
        yield scratch


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()
