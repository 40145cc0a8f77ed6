"""Kept and dropped images in the formats of other tools: DataComp's subset, a table of pairs, a list of keys."""

from __future__ import annotations

import re
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

_UID = "[0-9a-fA-F]{32}"
_AT_ONCE = 2**20


def are_uids(keys: pa.ChunkedArray) -> npt.NDArray[np.bool_]:
    """Tell which of n strings are identifiers of DataComp, 32 hexadecimal digits: bool [n]."""
    found: npt.NDArray[np.bool_] = pc.match_substring_regex(keys, f"^{_UID}$").to_numpy()
    return found


def is_uid(key: object) -> bool:
    """Tell whether a value is an identifier of DataComp."""
    return isinstance(key, str) and re.fullmatch(_UID, key) is not None


def write_uids(path: Path, uids: pa.ChunkedArray, *, overwrite: bool) -> int:
    """Write identifiers as DataComp's resharder and leaderboard read them: npy of their 64-bit halves, sorted, each once.

    Args:
        uids: Strings of 32 hexadecimal digits, in any order. Repeated ones are written once: for each occurrence the
            resharder would write the sample.
        overwrite: Replace a file with other content.

    Returns:
        The number written.

    Raises:
        ClipcidError: when a file with other content exists, or it cannot be written.
    """
    halves = np.empty((len(uids), 2), np.uint64)
    for start in range(0, len(uids), _AT_ONCE):
        text = "".join(uids.slice(start, _AT_ONCE).to_pylist())
        halves[start : start + _AT_ONCE] = np.frombuffer(bytes.fromhex(text), ">u8").reshape(-1, 2)
    halves = halves[np.lexsort((halves[:, 1], halves[:, 0]))]
    if len(halves):
        halves = halves[np.append(True, (halves[1:] != halves[:-1]).any(axis=1))]
    with named_file(path, overwrite) as file:
        np.save(file, np.ascontiguousarray(halves, "<u8").view(UID_HALVES)[:, 0], allow_pickle=False)
    return len(halves)


def write_pairs(path: Path, pairs: pa.Table, *, overwrite: bool) -> None:
    """Write a table of dropped images as parquet or csv.

    Args:
        path: The file; csv where its name ends in `.csv`.
        pairs: Columns ``from`` and ``to`` (string), ``distance`` (float32), see `read_dropped`.
        overwrite: Replace a file with other content.

    Raises:
        ClipcidError: as `write_uids`.
    """
    with named_file(path, overwrite) as file:
        if path.suffix == ".csv":
            frame = pairs.to_pandas()
            # The fewest digits that denote the same float32.
            frame["distance"] = [str(distance) for distance in frame["distance"].to_numpy()]
            file.write(pack_csv(frame))
        else:
            pq.write_table(pairs, file, compression="zstd")


def write_keys(path: Path, keys: pa.ChunkedArray, *, overwrite: bool) -> None:
    """Write keys as UTF-8 text, one a line.

    Raises:
        ClipcidError: when a key holds a line break, so that its line would be two; and as `write_uids`.
    """
    broken = pc.match_substring_regex(keys, r"[\r\n]").to_numpy()
    if broken.any():
        raise ClipcidError(
            f"Key {keys[int(np.argmax(broken))].as_py()!r} contains a line break, so it cannot be a line of {path}.",
            "Omit --write-keys: the keep list has the keys.",
        )
    with named_file(path, overwrite) as file:
        for start in range(0, len(keys), _AT_ONCE):
            file.write("".join(f"{key}\n" for key in keys.slice(start, _AT_ONCE).to_pylist()).encode())
