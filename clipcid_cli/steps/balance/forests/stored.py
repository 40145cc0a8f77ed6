"""The forest of a search on the disk, whose row numbers are those of the keep list whatever rows were searched."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from clipcid_cli.algorithms.near.edges import Edges
from clipcid_cli.formats.arrays import Arrays
from clipcid_cli.formats.fingerprint import FileRecord
from clipcid_cli.formats.results.forest import StoredForest, read_forest, write_forest
from clipcid_cli.formats.results.row_files import ROW_FILES
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.steps.balance.rows import BalanceRows
from clipcid_cli.steps.shared_arrays import share_arrays


@dataclasses.dataclass(frozen=True)
class Forest:
    """A forest that is complete up to a distance; after a search in partitions it may lack edges.

    Attributes:
        edges: Ascending by (weight, smaller row, larger row).
        cutoff: The distance.
        pairs: All pairs of unique rows up to it, ascending, where the search that made it kept them.
    """

    edges: Edges
    cutoff: float
    pairs: Edges | None = None


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

    def write(self, forest: Forest, seconds: float) -> None:
        """Write a forest that took so long to search."""
        edges = forest.edges
        stored = StoredForest(edges.a, edges.b, edges.weight, forest.cutoff, len(self.rows), self._kind)
        took, row_files = {"search": seconds}, self.work / ROW_FILES
        write_forest(self.folder, stored, row_files, inputs=self.inputs, seconds=took, overwrite=self.overwrite)
