"""The forest in the folder of `balance`, which is of the rows of this run, or of an earlier one with fewer files."""

from __future__ import annotations

import dataclasses

import numpy as np

from clipcid_cli.algorithms.near.edges import Edges, merge_edges
from clipcid_cli.algorithms.near.exact import BoolArray, row_type
from clipcid_cli.formats.arrays import Arrays
from clipcid_cli.formats.fingerprint import find_lost
from clipcid_cli.formats.output import OutputSpec
from clipcid_cli.formats.results.forest import (
    ROW_NUMBERING,
    ForestSidecar,
    NumberedFile,
    StoredForest,
    find_earlier,
    forest_spec,
    read_forest,
    read_row_numbering,
    row_numbering_path,
    write_forest,
)
from clipcid_cli.steps import reporting
from clipcid_cli.steps.balance.balance_run import BalanceRun


@dataclasses.dataclass(frozen=True)
class Forest:
    """The ascending edges of a forest that is complete up to a distance; after a search in partitions it may lack some."""

    edges: Edges
    searched_to: float

    def has_all_to(self, distance: float, num_rows: int) -> bool:
        """Tell whether no edge up to a distance is missing, given how many rows are searched: a tree of all has no more."""
        return len(self.edges) == num_rows - 1 or self.searched_to >= float(np.float32(distance))


def _spec(run: BalanceRun) -> OutputSpec[ForestSidecar]:
    """Ask for the forest of these rows."""
    inputs = [*run.output.spec.inputs, *run.rows.describe_choice()]
    return forest_spec(run.folder, inputs, run.settings.forest_kind, overwrite=run.settings.overwrite)


def read_stored(run: BalanceRun) -> Forest | None:
    """Read the forest, if one of these rows is stored; the same on every process."""

    def read() -> Arrays:
        stored = read_forest(_spec(run))
        return () if stored is None else (stored.a, stored.b, stored.distance, np.array([stored.searched_to]))

    stored = run.shared.publish(read)
    return Forest(Edges(*stored[:3]), float(stored[3][0])) if stored else None


def read_earlier(run: BalanceRun) -> tuple[Forest, BoolArray] | None:
    """Read the exact forest of fewer files where all of them are still there, in order; the same on every process.

    Returns:
        The forest, with the edges of all copies, in the numbers of all rows; and which rows it is not of, bool [N].
    """
    if run.settings.forest_kind != "exact":
        return None

    def read() -> Arrays:
        spec = _spec(run)
        sidecar = find_earlier(spec)
        if sidecar is None or not sidecar.cutoff:
            return ()
        fix = "Add --overwrite to search the forest again."
        paths = (run.work / ROW_NUMBERING, row_numbering_path(run.folder, "exact"))
        files, earlier = ([file for file in read_row_numbering(path, fix) if file.rows is not None] for path in paths)
        is_new = _find_new(run, files, earlier)
        lost = find_lost(earlier, files)
        stored = read_forest(dataclasses.replace(spec, inputs=sidecar.inputs))
        if lost or stored is None or stored.num_rows != np.count_nonzero(~is_new):
            reporting.note(
                "The existing forest cannot be extended, since its files are not all there, unchanged and in the "
                f"same order{lost and f' ({lost})'}: all pairs are compared."
            )
            return ()
        rows = np.flatnonzero(~is_new).astype(row_type(len(is_new)))
        edges, _ = merge_edges(Edges(rows[stored.a], rows[stored.b], stored.distance), run.rows.copies)
        return edges.a, edges.b, edges.weight, np.array([stored.searched_to]), is_new

    arrays = run.shared.publish(read)
    return (Forest(Edges(*arrays[:3]), float(arrays[3][0])), arrays[4]) if arrays else None


def _find_new(run: BalanceRun, files: list[NumberedFile], earlier: list[NumberedFile]) -> BoolArray:
    """Return which rows are of none of the earlier files, bool [N]."""
    numbers = run.rows.numbers
    is_new = np.ones(len(numbers), np.bool_)
    left = iter(earlier)
    end = 0
    known = next(left, None)
    for file in files:
        start, end = end, end + (file.rows or 0)
        if known is not None and file.content == known.content:
            is_new[slice(*np.searchsorted(numbers, np.array([start, end], numbers.dtype)))] = False
            known = next(left, None)
    return is_new


def write_stored(run: BalanceRun, forest: Forest, seconds: float) -> None:
    """Write a forest that took so long to search."""
    edges = forest.edges
    stored = StoredForest(edges.a, edges.b, edges.weight, forest.searched_to, len(run.rows))
    write_forest(_spec(run), stored, run.work / ROW_NUMBERING, {"search": seconds})
