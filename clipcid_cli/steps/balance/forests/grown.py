"""The forest of fewer files, from which that of all of them follows: only new rows are compared.

MSF(A ∪ B) = MSF(MSF(A) ∪ B) for the pairs B that have a new row. Files may have been added anywhere: rows keep their order,
so ties are broken as before.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from clipcid_cli.algorithms.near.edges import Edges, merge_edges
from clipcid_cli.algorithms.near.exact import row_type
from clipcid_cli.algorithms.near.tiles import GrownSearch
from clipcid_cli.formats.arrays import Arrays
from clipcid_cli.formats.fingerprint import FileRecord
from clipcid_cli.formats.results.forest import find_earlier, read_forest, row_files_path
from clipcid_cli.formats.results.row_files import ROW_FILES, read_row_files
from clipcid_cli.formats.sidecar import ForestSidecar
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.steps.balance.forests.stored import ForestStore
from clipcid_cli.steps.balance.rows import BalanceRows
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.shared_arrays import share_arrays

_NAMED = 3


@dataclasses.dataclass(frozen=True)
class SmallerForest:
    """The forest of some of the rows.

    Attributes:
        edges: Its edges and those of all copies, ascending by (weight, smaller row, larger row), in the numbers of all rows.
        cutoff: The distance that it is complete to.
        is_new: Which rows it is not of, bool [N].
        name: Identifies it.
    """

    edges: Edges
    cutoff: float
    is_new: npt.NDArray[np.bool_]
    name: str


def read_smaller(machine: Machine, store: ForestStore, rows: BalanceRows, reporter: Reporter) -> SmallerForest | None:
    """Read the stored forest where all of its files are still among those of the rows; the same on every process.

    Args:
        rows: All finite rows.
    """

    def read() -> tuple[SmallerForest | None, str]:
        sidecar = find_earlier(store.folder, store.inputs, overwrite=store.overwrite)
        if sidecar is None or not sidecar.cutoff:
            return None, ""
        files = _read_images(store.work / ROW_FILES)
        earlier = _read_images(row_files_path(store.folder, "exact"))
        ends = np.cumsum([count for _, count in files])
        kept, number = list[tuple[int, int]](), 0
        for (file, count), end in zip(files, ends.tolist(), strict=True):
            if number < len(earlier) and file.content == earlier[number][0].content:
                kept.append((end - count, end))
                number += 1
        if number < len(earlier):
            return None, _why_not([file for file, _ in earlier], [file for file, _ in files])
        stored = read_forest(store.folder, sidecar.inputs, overwrite=store.overwrite)
        kind = row_type(len(rows))
        bounds = [np.searchsorted(rows.numbers, np.array(part, rows.numbers.dtype)) for part in kept]
        places = np.concatenate([np.arange(*ends, dtype=kind) for ends in bounds])
        if stored is None or stored.num_rows != len(places):
            return None, "its rows are not those of its files."
        is_new = np.ones(len(rows), np.bool_)
        is_new[places] = False
        edges = merge_edges(Edges(places[stored.a], places[stored.b], stored.distance), rows.copies)
        return SmallerForest(edges, stored.cutoff, is_new, _digest(sidecar)), ""

    def share() -> Arrays:
        smaller, why_not = read()
        if why_not:
            reporter.note(f"The forest that is there cannot be extended: {why_not}")
        if smaller is None:
            return ()
        edges = smaller.edges
        name = np.frombuffer(smaller.name.encode(), np.uint8)
        return edges.a, edges.b, edges.weight, np.array([smaller.cutoff]), smaller.is_new, name

    arrays = share_arrays(machine, store.work, share)
    if not arrays:
        return None
    return SmallerForest(Edges(*arrays[:3]), float(arrays[3][0]), arrays[4], bytes(arrays[5]).decode())


def search_new(
    rows: BalanceRows, smaller: SmallerForest, machine: Machine, scan: torch.dtype, room: int, reporter: Reporter
) -> GrownSearch:
    """Prepare the comparison of new rows with all."""
    is_new = smaller.is_new[rows.unique]
    new, old = rows.unique[is_new], rows.unique[~is_new]
    number = np.count_nonzero(~smaller.is_new)
    reporter.note(f"A forest of {number:,} of the {len(rows):,} images exists: only the others are compared.")
    return GrownSearch(rows.read, new, old, machine.device, scan, room)


def _read_images(path: Path) -> list[tuple[FileRecord, int]]:
    """Read which files of image embeddings rows are numbered through, and how many each has."""
    files = read_row_files(path, "Add --overwrite to search the forest again.")
    return [(file, file.rows) for file in files if file.rows is not None]


def _why_not(earlier: Sequence[FileRecord], files: Sequence[FileRecord]) -> str:
    """Name the files that are gone, have changed or are in another order."""
    there = {file.content for file in files}
    gone = [Path(each.path).name for each in earlier if each.content not in there]
    if not gone:
        return "the files are in another order, and of equal distances the earlier row goes first."
    more = f" and {len(gone) - _NAMED:,} more" if len(gone) > _NAMED else ""
    return (
        f"{', '.join(gone[:_NAMED])}{more} of {len(earlier):,} files have changed or are gone, and what joined "
        "other images through theirs is not in the forest. All pairs are compared."
    )


def _digest(sidecar: ForestSidecar) -> str:
    content = [sidecar.cutoff, *(each.content for each in sidecar.outputs)]
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=4).hexdigest()
