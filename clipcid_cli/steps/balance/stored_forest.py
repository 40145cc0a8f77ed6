"""The forest of a search on the disk: that of these rows, or of fewer files, from which that of all of them follows.

MSF(A ∪ B) = MSF(MSF(A) ∪ B) for the pairs B that have a new row. Files may have been added anywhere: rows keep their order,
so ties are broken as before.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import numpy.typing as npt

from clipcid_cli.algorithms.near.edges import Edges, merge_edges
from clipcid_cli.algorithms.near.exact import row_type
from clipcid_cli.formats.arrays import Arrays
from clipcid_cli.formats.embeddings.manifest import find_lost
from clipcid_cli.formats.fingerprint import FileRecord
from clipcid_cli.formats.results.forest import (
    ROW_FILES,
    RowFile,
    StoredForest,
    find_earlier,
    read_forest,
    read_row_files,
    row_files_path,
    write_forest,
)
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.steps.balance.rows import BalanceRows
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.shared_arrays import share_arrays


@dataclasses.dataclass(frozen=True)
class Forest:
    """A forest that is complete up to a distance; after a search in partitions it may lack edges.

    Attributes:
        edges: Ascending by (weight, smaller row, larger row).
        cutoff: The distance.
    """

    edges: Edges
    cutoff: float


@dataclasses.dataclass(frozen=True)
class EarlierForest(Forest):
    """The forest of the rows of fewer files, with the edges of all copies, in the numbers of all rows.

    Attributes:
        is_new: Which rows it is not of, bool [N].
    """

    is_new: npt.NDArray[np.bool_]


@dataclasses.dataclass(frozen=True)
class ForestStore:
    """Where the forest of some rows is stored.

    Attributes:
        folder: The folder of `balance`.
        work: Where processes share it.
        rows: The rows that it is of.
        inputs: What decides them.
        neighbors: How it is searched: ``exact`` or ``partitioned``.
        overwrite: Whether one that cannot be read is replaced.
    """

    folder: Path
    work: Path
    rows: BalanceRows
    inputs: list[FileRecord]
    neighbors: str
    overwrite: bool

    @property
    def _kind(self) -> str:
        return self.neighbors if self.rows.is_searched is None else f"{self.neighbors}-filtered"

    def read(self, machine: Machine) -> Forest | None:
        """Read the forest, if one of these rows is stored; the same on every process."""

        def read() -> Arrays:
            stored = read_forest(self.folder, self.inputs, self._kind, overwrite=self.overwrite)
            if stored is None:
                return ()
            return stored.a, stored.b, stored.distance, np.array([stored.cutoff])

        found = share_arrays(machine, self.work, read)
        return Forest(Edges(*found[:3]), float(found[3][0])) if found else None

    def read_earlier(self, machine: Machine, reporter: Reporter) -> EarlierForest | None:
        """Read the exact forest of fewer files where all of them are still there, in order; the same on every process."""
        if self._kind != "exact":
            return None

        def read() -> Arrays:
            sidecar = find_earlier(self.folder, self.inputs, overwrite=self.overwrite)
            if sidecar is None or not sidecar.cutoff:
                return ()
            files, earlier = map(_read_images, (self.work / ROW_FILES, row_files_path(self.folder, "exact")))
            is_new, lost = self._find_new(files, earlier), find_lost(earlier, files)
            stored = read_forest(self.folder, sidecar.inputs, overwrite=self.overwrite)
            if lost or stored is None or stored.num_rows != np.count_nonzero(~is_new):
                reporter.note(
                    "The forest that is there cannot be extended, since its files are not all there as they were and in "
                    f"that order{lost and f' ({lost})'}: all pairs are compared."
                )
                return ()
            rows = np.flatnonzero(~is_new).astype(row_type(len(is_new)))
            edges = Edges(rows[stored.a], rows[stored.b], stored.distance)
            edges, _ = merge_edges(edges, self.rows.copies)
            return edges.a, edges.b, edges.weight, np.array([stored.cutoff]), is_new

        found = share_arrays(machine, self.work, read)
        return EarlierForest(Edges(*found[:3]), float(found[3][0]), found[4]) if found else None

    def _find_new(self, files: list[RowFile], earlier: list[RowFile]) -> npt.NDArray[np.bool_]:
        """Return which rows are of none of the earlier files, bool [N]."""
        is_new, left, end = np.ones(len(self.rows), np.bool_), iter(earlier), 0
        known = next(left, None)
        for file in files:
            start, end = end, end + (file.rows or 0)
            if known is not None and file.content == known.content:
                bounds = np.array([start, end], self.rows.numbers.dtype)
                is_new[slice(*np.searchsorted(self.rows.numbers, bounds))] = False
                known = next(left, None)
        return is_new

    def write(self, forest: Forest, seconds: float) -> None:
        """Write a forest that took so long to search."""
        edges = forest.edges
        stored = StoredForest(edges.a, edges.b, edges.weight, forest.cutoff, len(self.rows), self._kind)
        took, row_files = {"search": seconds}, self.work / ROW_FILES
        write_forest(self.folder, stored, row_files, inputs=self.inputs, seconds=took, overwrite=self.overwrite)


def _read_images(path: Path) -> list[RowFile]:
    """Read which files of image embeddings rows are numbered through."""
    files = read_row_files(path, "Add --overwrite to search the forest again.")
    return [file for file in files if file.rows is not None]
