"""The part of `balance` that takes the time: from mapped embeddings to the single-linkage forest, on all processes.

Tiles of the comparison of all rows with all rows are dealt out to the processes. Each folds what it finds into a forest and
saves it now and then; the first process folds those together at the end. A killed search resumes on what was saved.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from clipcid_cli.algorithms.search.cutoff import FARTHEST, NearestSample, first_cutoff, wider_cutoff
from clipcid_cli.algorithms.search.distances import HalfArray, IntArray
from clipcid_cli.algorithms.search.duplicates import collapse_duplicates, hash_rows
from clipcid_cli.algorithms.search.edges import Edges
from clipcid_cli.algorithms.search.pair_search import TiledSearch
from clipcid_cli.algorithms.search.partitioned_search import PartitionedSearch
from clipcid_cli.algorithms.sets.collector import PairCollector
from clipcid_cli.formats.embeddings.rows import Rows
from clipcid_cli.formats.results.forest import ForestPart, ForestParts, StoredForest, read_forest, write_forest
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.runtime.precision import choose_scan
from clipcid_cli.steps.balance.partition import partition_rows
from clipcid_cli.steps.reporting import Reporter

# Rows whose nearest neighbours are looked up to choose the first cut-off: its share is then known within 3 %.
CUTOFF_SAMPLE = 1024
# Rows looked at together; what is made of so few stays in the processor's cache.
_ROWS_AT_ONCE = 512
_SECONDS_BETWEEN_SAVES = 60.0
# Pairs that a search for stars keeps, of all processes: 20 bytes each, and several times that to sort and cover them.
_MOST_PAIRS = 2**24


@dataclasses.dataclass(frozen=True)
class Survey:
    """What one look at every row told. Rows are numbered among the readable ones, as in the keep list.

    Attributes:
        readable: Numbers, among the embeddings, of the rows that are finite, int64 [N].
        unique: The rows that equal no earlier one, int64, ascending.
        copies: Edges of weight 0 that tie each other row to the first of its kind.
    """

    images: Rows
    readable: IntArray
    unique: IntArray
    copies: Edges

    @property
    def num_rows(self) -> int:
        """Number of readable rows."""
        return len(self.readable)

    def read(self, rows: IntArray) -> HalfArray:
        """Read rows by their numbers, float16 [n, D]."""
        return self.images.take(self.readable[rows])


@dataclasses.dataclass(frozen=True)
class Forest:
    """A forest that is complete up to a distance; one that was searched for in partitions may lack edges.

    Attributes:
        edges: Ascending by (weight, smaller row, larger row).
        pairs: All pairs of unique rows up to it, ascending, where the search that made it kept them.
    """

    edges: Edges
    cutoff: float
    pairs: Edges | None = None


def survey_rows(machine: Machine, images: Rows, reporter: Reporter) -> Survey:
    """Look at every row once: is it finite, and does it equal an earlier one? Each process looks at its share."""
    start, stop = (machine.rank + np.array([0, 1])) * len(images) // machine.size
    hashes: list[npt.NDArray[np.uint64]] = []
    finite: list[npt.NDArray[np.bool_]] = []
    for begin in range(start, stop, _ROWS_AT_ONCE):
        rows = images.read(begin, min(begin + _ROWS_AT_ONCE, int(stop)))
        hashes.append(hash_rows(rows))
        finite.append(np.all(np.isfinite(rows), axis=1, keepdims=True)[:, 0])
    gathered = machine.gather(
        (np.concatenate([*hashes, []]).astype(np.uint64), np.concatenate([*finite, []]).astype(bool))
    )
    readable = np.flatnonzero(np.concatenate([part[1] for part in gathered]))
    hash_N = np.concatenate([part[0] for part in gathered])[readable]
    numbers = np.arange(len(readable))
    unique, copies = machine.on_main(
        lambda: collapse_duplicates(lambda rows: images.take(readable[rows]), numbers, hash_N)
    )
    if len(copies):
        reporter.note(f"{len(copies):,} rows are exact copies of earlier ones.")
    return Survey(images, readable, unique, copies)


def find_forest(
    machine: Machine,
    folder: Path,
    survey: Survey,
    inputs: list[dict[str, Any]],
    *,
    cutoff: float | None,
    num_edges: int,
    precision: str,
    reporter: Reporter,
    neighbors: str = "exact",
    for_stars: bool = False,
) -> tuple[Forest, bool]:
    """Return a forest that reaches far enough: the one on disk, or that one extended, or a new one.

    Args:
        folder: Where the forest is kept.
        cutoff: The distance it must be complete to; None when a number of edges is wanted.
        num_edges: Otherwise, the number of edges it must have; at most N − 1.
        precision: Format in which near pairs are looked for, see `choose_precision`.
        neighbors: ``exact`` or ``partitioned``: compare all pairs, or those in and near partitions.
        for_stars: Keep the pairs that a search finds, while they are few, and search as far as a cover by stars needs.

    Returns:
        The forest, and whether it was there already.
    """
    started = time.perf_counter()
    complete = survey.num_rows - 1
    stored = machine.on_main(lambda: read_forest(folder, inputs, neighbors))
    # Copies are at distance 0 and no other pairs are, so their edges are the forest up to 0.
    forest = Forest(survey.copies, 0.0) if stored is None else _load(stored)
    scan = choose_scan(precision, machine.device)
    join = TiledSearch(survey.read, survey.unique, machine.device, scan.dtype)
    if stored is None and len(survey.unique) > 1:
        reporter.note(f"Near pairs are looked for in {scan.name} ({scan.reason}) and decided in fp64.")
    outlook = CutoffEstimator(survey, join.rows, machine.device, scan.dtype, for_stars)
    most_pairs = _MOST_PAIRS // machine.size if for_stars else 0
    new = stored is None
    while len(forest.edges) < complete and not _is_enough(forest, cutoff, num_edges):
        choose = partial(outlook.choose, forest, num_edges)
        reach = machine.on_main(choose) if cutoff is None else float(np.float32(cutoff))
        search: TiledSearch | PartitionedSearch | None = join
        # At the largest distance only a search of all pairs is sure to find what is missing.
        if neighbors == "partitioned" and forest.cutoff < reach < FARTHEST:
            search = partition_rows(machine, join, survey.read, scan.dtype, reach, reporter)
        if search is None:
            reporter.note(f"Up to distance {reach:.4f} partitions would spare little: all pairs are compared.")
            search = join
        name = f"{_digest(inputs)}-{np.float32(reach).view(np.uint32):08x}-{_name_of(search)}"
        parts = ForestParts(folder, name)
        # Partitions may miss pairs, and find some twice: stars then take theirs from within the components.
        most = most_pairs if search is join else 0
        edges, pairs = _search(machine, search, parts, survey.num_rows, forest.edges, reach, most, reporter)
        forest = Forest(edges, reach, pairs)
        new = True
        if not _is_enough(forest, cutoff, num_edges) and len(edges) < complete:
            reporter.note(
                f"Up to distance {reach:.4f} there are {len(edges):,} of {num_edges:,} edges; searching further."
            )
    if new:
        seconds = {"search": time.perf_counter() - started}
        machine.on_main(lambda: _save(folder, forest, neighbors, survey.num_rows, inputs, seconds))
    machine.on_main(ForestParts(folder, "").clear)
    return forest, not new


def _is_enough(forest: Forest, cutoff: float | None, num_edges: int) -> bool:
    if cutoff is not None:
        return forest.cutoff >= float(np.float32(cutoff))
    return len(forest.edges) >= num_edges


def _load(stored: StoredForest) -> Forest:
    return Forest(Edges(stored.a, stored.b, stored.distance), stored.cutoff)


def _save(
    folder: Path,
    forest: Forest,
    neighbors: str,
    num_rows: int,
    inputs: list[dict[str, Any]],
    seconds: dict[str, float],
) -> None:
    edges = forest.edges
    stored = StoredForest(edges.a, edges.b, edges.weight, forest.cutoff, num_rows, neighbors)
    write_forest(folder, stored, inputs=inputs, seconds=seconds)


def _name_of(join: TiledSearch | PartitionedSearch) -> str:
    return join.name if isinstance(join, PartitionedSearch) else str(join.panel_rows)


def _digest(inputs: Sequence[dict[str, Any]]) -> str:
    content = json.dumps([(entry["size"], entry["hash"]) for entry in inputs])
    return hashlib.blake2b(content.encode(), digest_size=6).hexdigest()


@dataclasses.dataclass(frozen=True)
class CutoffEstimator:
    """How far a search must reach for a number of edges, judged from a fixed sample of the unique rows."""

    survey: Survey
    rows: IntArray
    device: torch.device
    scan_dtype: torch.dtype
    for_stars: bool

    @cached_property
    def nearest(self) -> NearestSample:
        """The nearest neighbours of a sample of rows, from which cut-offs are estimated."""
        size = min(CUTOFF_SAMPLE, len(self.rows))
        sample = np.sort(np.random.default_rng(0).choice(len(self.rows), size, replace=False))
        # Each row meets the sample only: to prepare it for int8 takes longer than a float32 product.
        scan_dtype = torch.float32 if self.scan_dtype == torch.int8 else self.scan_dtype
        return NearestSample(self.survey.read, self.rows, sample, self.device, scan_dtype)

    def choose(self, forest: Forest, num_edges: int) -> float:
        """Return the next cut-off to search up to."""
        # Edges between unique rows only, as the sample counts them.
        num_copies = len(self.survey.copies)
        if forest.cutoff == 0.0:
            return first_cutoff(self.nearest, (num_edges - num_copies) / len(self.rows), self.for_stars)
        return wider_cutoff(self.nearest, forest.cutoff, len(forest.edges) - num_copies, num_edges - num_copies)


def _search(
    machine: Machine,
    join: TiledSearch | PartitionedSearch,
    parts: ForestParts,
    num_rows: int,
    known: Edges,
    cutoff: float,
    most_pairs: int,
    reporter: Reporter,
) -> tuple[Edges, Edges | None]:
    """Search every tile that no earlier run has done, and fold everything together; the same on every process.

    Args:
        parts: Where processes save what they found.
        known: Forest edges known already; they need not reach the cut-off.
        cutoff: The distance to search to.
        most_pairs: Pairs that each process keeps at most.

    Returns:
        The forest, and all pairs where they were kept.
    """

    def load() -> tuple[set[tuple[int, int]], PairCollector]:
        done: set[tuple[int, int]] = set()
        collector = PairCollector(num_rows, known, most_pairs * machine.size)
        for part in parts.read():
            done |= {(i, j) for i, j in part.tiles.tolist()}
            collector.add(Edges(part.a, part.b, part.distance))
            if not part.has_all:
                collector.forget_pairs()
        return done, collector

    def resume() -> tuple[set[tuple[int, int]], Edges, int]:
        done, collector = load()
        return done, collector.forest(), parts.next_session()

    def finish() -> tuple[Edges, Edges | None]:
        _, collector = load()
        return collector.forest(), collector.pairs()

    done, forest, session = machine.on_main(resume)
    left = [tile for tile in join.tiles() if tile not in done]
    if done:
        reporter.note(f"Resuming the search: {len(done)} of {len(join.tiles())} tiles are done.")
    mine = left[machine.rank :: machine.size]
    collector = PairCollector(num_rows, forest, most_pairs)
    saved = time.monotonic()
    with reporter.progress("search", sum(map(join.num_pairs, mine)), "pairs") as progress:
        for number, tile in enumerate(mine, 1):
            for edges in join.search_tile(tile, cutoff, collector.may_matter):
                collector.add(edges)
            progress.advance(join.num_pairs(tile))
            if number == len(mine) or time.monotonic() - saved > _SECONDS_BETWEEN_SAVES:
                pairs = collector.pairs()
                kept = collector.forest() if pairs is None else pairs
                tiles, has_all = np.array(mine[:number], np.int64), np.array(pairs is not None)
                parts.write(session, machine.rank, ForestPart(tiles, kept.a, kept.b, kept.weight, has_all))
                saved = time.monotonic()
    machine.barrier()
    return machine.on_main(finish)
