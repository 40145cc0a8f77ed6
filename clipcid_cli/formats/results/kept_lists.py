"""Kept and dropped images in the formats of other tools: DataComp's subset, a table of pairs, a list of keys."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.atomic import named_file, pack_csv

# DataComp's subset: its resharder loads the file, asserts this dtype and finds each sample by bisection.
UID_HALVES = np.dtype([("f0", "<u8"), ("f1", "<u8")])

_PAIRS = pa.schema([("from", pa.string()), ("to", pa.string()), ("distance", pa.float32())])
_UID = "[0-9a-fA-F]{32}"
_AT_ONCE = 2**16


def are_uids(keys: pa.ChunkedArray) -> npt.NDArray[np.bool_]:
    """Tell which of n strings are identifiers of DataComp, 32 hexadecimal digits: bool [n]."""
    found: npt.NDArray[np.bool_] = pc.match_substring_regex(keys, f"^{_UID}$").to_numpy()
    return found


def is_uid(key: object) -> bool:
    """Tell whether a value is an identifier of DataComp."""
    return isinstance(key, str) and re.fullmatch(_UID, key) is not None


def write_uids(path: Path, uids: Iterable[pa.ChunkedArray], count: int, *, overwrite: bool) -> int:
    """Write identifiers as DataComp's resharder and leaderboard read them: npy of their 64-bit halves, sorted.

    Args:
        uids: `count` strings of 32 hexadecimal digits, in any order, in parts.

    Returns:
        The number written: repeated ones once, since the resharder would write the sample for each occurrence.
    """
    halves = np.empty((count, 2), np.uint64)
    start = 0
    for part in uids:
        for at in range(0, len(part), _AT_ONCE):
            text = "".join(part.slice(at, _AT_ONCE).to_pylist())
            found = np.frombuffer(bytes.fromhex(text), ">u8").reshape(-1, 2)
            halves[start : start + len(found)] = found
            start += len(found)
    assert start == count, f"{start} of {count} identifiers"
    halves = halves[np.lexsort((halves[:, 1], halves[:, 0]))]
    is_first = np.ones(count, np.bool_)
    is_first[1:] = (halves[1:] != halves[:-1]).any(axis=1)
    halves = halves[is_first]
    with named_file(path, overwrite) as file:
        np.save(file, np.ascontiguousarray(halves, "<u8").view(UID_HALVES)[:, 0], allow_pickle=False)
    return len(halves)


def write_pairs(path: Path, pairs: Iterable[pa.Table], *, overwrite: bool) -> None:
    """Write the dropped images that `read_dropped` reads, as csv where the file's name ends so, else as parquet."""
    with named_file(path, overwrite) as file:
        if path.suffix == ".csv":
            for number, part in enumerate(pairs):
                frame = part.to_pandas()
                # The fewest digits that denote the same float32.
                frame["distance"] = [str(distance) for distance in frame["distance"].to_numpy()]
                file.write(pack_csv(frame, header=number == 0))
        else:
            with pq.ParquetWriter(file, _PAIRS, compression="zstd") as writer:
                for part in pairs:
                    writer.write_table(part.cast(_PAIRS))


def write_keys(path: Path, keys: Iterable[pa.Array], *, overwrite: bool) -> None:
    """Write keys, in parts, as UTF-8 text, one a line; a key that holds a line break, which would be two, is refused."""
    with named_file(path, overwrite) as file:
        for part in keys:
            broken = part.filter(pc.match_substring_regex(part, r"[\r\n]"))
            if len(broken):
                raise ClipcidError(
                    f"Key {broken[0].as_py()!r} contains a line break, so it cannot be a line of {path}.",
                    "Omit --write-keys: the keep list has the keys.",
                )
            for start in range(0, len(part), _AT_ONCE):
                lines = part.slice(start, _AT_ONCE).to_pylist()
                file.write("".join(f"{line}\n" for line in lines).encode())
