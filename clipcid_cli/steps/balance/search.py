"""The longest part of `balance`: from mapped embeddings to the single-linkage forest, on all processes.

The tiles of the comparison of all rows with all rows are divided among the processes. Each merges the pairs it finds into a
forest and saves that regularly; the first process merges what all have saved. A killed search resumes from it.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from functools import partial
from itertools import chain

import numpy as np
import numpy.typing as npt

from clipcid_cli.algorithms.near.cutoff import FARTHEST, CutoffEstimator
from clipcid_cli.algorithms.near.edges import Edges
from clipcid_cli.algorithms.near.partitioned_search import PartitionedSearch
from clipcid_cli.algorithms.near.search import CACHE_BYTES
from clipcid_cli.algorithms.near.tiles import TiledSearch, deal, left_after
from clipcid_cli.algorithms.sets.collector import PairCollector
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.arrays import Arrays
from clipcid_cli.formats.embeddings.grouped import remove_copies
from clipcid_cli.formats.fingerprint import FileRecord
from clipcid_cli.formats.results.balance_parts import ForestPart, ForestParts
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.runtime.memory import memory_for_rows
from clipcid_cli.runtime.pacing import SavePace
from clipcid_cli.runtime.precision import choose_scan
from clipcid_cli.steps.balance.forests.grown import read_smaller, search_new
from clipcid_cli.steps.balance.forests.stored import Forest, ForestStore
from clipcid_cli.steps.balance.partition import partition_rows
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.shared_arrays import share_arrays

# Measured at 1 and 4 million rows, 1.8 and 9.9 s: what the first save is expected to take.
_SECONDS_TO_SAVE_A_ROW = 2.5e-6
# Pairs that all processes of a search for stars keep: 20 bytes each, and several times that to sort and cover them.
_MOST_PAIRS = 2**24


def find_forest(
    machine: Machine,
    store: ForestStore,
    *,
    cutoff: float | None,
    num_edges: int,
    precision: str,
    reporter: Reporter,
    for_stars: bool = False,
) -> tuple[Forest, bool]:
    """Return a forest that reaches far enough: the stored one, that one extended, or a new one.

    Where the stored forest is of some of the files, only the rows of the others are compared.

    Args:
        store: Where the forest is stored, and of which rows it is.
        cutoff: The distance it must be complete to; None where it must have a number of edges.
        num_edges: That number; at most N − 1.
        precision: Format of the fast product, see `choose_scan`.
        for_stars: Keep the pairs that a search finds, while they are few, and search as far as a star cover needs.

    Returns:
        The forest, and whether the stored one reached far enough.
    """
    started = time.perf_counter()
    folder, rows, neighbors = store.work, store.rows, store.neighbors
    machine.on_main(lambda: remove_copies(folder))  # of a run that was killed
    stored = store.read(machine)
    is_new = stored is None
    # Copies are at distance 0 and no other pairs are, so their edges are the forest up to 0.
    forest = Forest(rows.copies, 0.0) if stored is None else stored
    scan, room = choose_scan(precision, machine.device), memory_for_rows(machine.device, on_cpu=CACHE_BYTES)
    all_pairs = TiledSearch(rows.read, rows.unique, machine.device, scan.dtype, cache_bytes=room)
    if is_new and len(rows.unique) > 1:
        reporter.note(f"Near pairs are searched in {scan.name} ({scan.reason}) and verified in fp64.")
    estimator = CutoffEstimator(rows.read, rows.unique, machine.device, for_stars)
    most_pairs = _MOST_PAIRS // machine.size if for_stars else 0
    complete, num_copies = rows.num_searched - 1, len(rows.copies)
    smaller = None
    if is_new and rows.is_searched is None and neighbors == "exact":
        smaller = read_smaller(machine, store, rows, reporter)
    while len(forest.edges) < complete and not _is_enough(forest, cutoff, num_edges):
        search: TiledSearch | PartitionedSearch = all_pairs
        known, name = forest.edges, ""
        if smaller is not None and (cutoff is None or float(np.float32(cutoff)) <= smaller.cutoff):
            # As far as it is known, so that nothing of it is lost; where that is not enough, all pairs follow.
            reach, known, name = smaller.cutoff, smaller.edges, f"-{smaller.name}"
            search = search_new(rows, smaller, machine, scan.dtype, room, reporter)
        else:
            # The sample holds unique rows, so edges of copies are not counted.
            choose = partial(estimator.choose, forest.cutoff, len(forest.edges) - num_copies, num_edges - num_copies)
            reach = machine.on_main(choose) if cutoff is None else float(np.float32(cutoff))
            if (there := stored or smaller) is not None:
                again = "all pairs are compared" if neighbors == "exact" else "it is searched again"
                reporter.note(f"The forest that is there ends at distance {there.cutoff:.4f}: {again}.")
        smaller = stored = None
        try:
            # At the largest distance only a search of all pairs is sure to find what is missing.
            if neighbors == "partitioned" and forest.cutoff < reach < FARTHEST:
                search = partition_rows(machine, folder, all_pairs, rows.read, scan.dtype, reach, reporter) or all_pairs
                if search is all_pairs:
                    reporter.note(f"Up to distance {reach:.4f} partitions would save little: all pairs are compared.")
            parts = ForestParts(
                folder, f"{_digest(store.inputs)}-{np.float32(reach).view(np.uint32):08x}-{search.name}{name}"
            )
            # Partitions may miss pairs, and find some twice: stars then take theirs from within the components.
            most = most_pairs if search is all_pairs else 0
            edges, pairs = _search_tiles(machine, search, parts, len(rows), known, reach, most, reporter)
            search = all_pairs  # drops the maps of the copies, which keep their space on the disk
            machine.barrier()
        finally:
            if machine.is_main:
                remove_copies(folder)
        forest = Forest(edges, reach, pairs)
        is_new = True
        if not _is_enough(forest, cutoff, num_edges) and len(edges) < complete:
            reporter.note(
                f"Up to distance {reach:.4f} there are {len(edges):,} of the {num_edges:,} edges needed; searching further."
            )
    if is_new:
        seconds = time.perf_counter() - started
        machine.on_main(lambda: store.write(forest, seconds))
    machine.on_main(ForestParts(folder, "").clear)
    return forest, not is_new


def _is_enough(forest: Forest, cutoff: float | None, num_edges: int) -> bool:
    if cutoff is not None:
        return forest.cutoff >= float(np.float32(cutoff))
    return len(forest.edges) >= num_edges


def _digest(inputs: Sequence[FileRecord]) -> str:
    content = json.dumps([each.content for each in inputs])
    return hashlib.blake2b(content.encode(), digest_size=6).hexdigest()


def _search_tiles(
    machine: Machine,
    search: TiledSearch | PartitionedSearch,
    parts: ForestParts,
    num_rows: int,
    known: Edges,
    cutoff: float,
    most_pairs: int,
    reporter: Reporter,
) -> tuple[Edges, Edges | None]:
    """Search every tile that no earlier run has finished, and merge all results; the same on every process.

    Args:
        parts: Where processes save what they found.
        known: Forest edges known already; they need not reach the cut-off.
        cutoff: The distance to search to.
        most_pairs: Limit of the pairs that each process keeps.

    Returns:
        The forest, and all pairs where they were kept.
    """
    everything, folder = search.tiles(), parts.folder

    def load() -> tuple[list[range], PairCollector, int]:
        collector = PairCollector(num_rows, known, most_pairs * machine.size)
        remaining, sessions = [range(len(everything))], parts.next_session()
        for session in range(sessions):
            done: list[int] = []
            for part in parts.read(session):
                # Where an earlier part has been lost since, a session divided other tiles than are left now: forget it.
                if part.tiles.tolist() != _describe(remaining).tolist():
                    continue
                done = done or [0] * part.size
                done[part.rank] = part.done
                collector.add(Edges(part.a, part.b, part.distance))
                if not part.has_all:
                    collector.forget_pairs()
            remaining = left_after(remaining, done) if done else remaining
        return remaining, collector, sessions

    def resume() -> Arrays:
        remaining, collector, sessions = load()
        forest = collector.forest()
        return _describe(remaining), np.array([sessions]), forest.a, forest.b, forest.weight

    def finish() -> Arrays:
        remaining, collector, _ = load()
        if num_lost := sum(map(len, remaining)):
            raise ClipcidError(
                f"{folder}: the results of {num_lost:,} of {len(everything):,} tiles cannot be read.",
                "Run the same command again.",
            )
        forest, pairs = collector.forest(), collector.pairs()
        return (forest.a, forest.b, forest.weight, *(() if pairs is None else (pairs.a, pairs.b, pairs.weight)))

    forest, remaining, session = known, [range(len(everything))], 0
    if machine.on_main(parts.next_session):
        left, sessions, *edges = share_arrays(machine, folder, resume)
        forest, remaining, session = Edges(*edges), [range(*each) for each in left.tolist()], int(sessions[0])
    if (num_left := sum(map(len, remaining))) < len(everything):
        reporter.note(f"Resuming the search: {len(everything) - num_left} of {len(everything)} tiles are done.")
    whose = (session, machine.rank, machine.size)

    def search_share() -> None:
        collector, mine = PairCollector(num_rows, forest, most_pairs), deal(remaining, machine.size)[machine.rank]

        def save(done: int) -> None:
            pairs = collector.pairs()
            kept = collector.forest() if pairs is None else pairs
            parts.write(ForestPart(*whose, _describe(remaining), done, kept.a, kept.b, kept.weight, pairs is not None))

        pace = SavePace(_SECONDS_TO_SAVE_A_ROW * num_rows)
        done, total = 0, sum(map(len, mine))
        # Tiles compare nearly equal numbers of pairs; to add up those of hundreds of millions of tiles takes minutes.
        num_pairs = search.num_all_pairs * total // max(1, len(everything))
        with reporter.progress("search", num_pairs, "pairs") as progress:
            tiles = map(everything.at, chain.from_iterable(mine))
            for tile, found in search.search_tiles(tiles, cutoff, collector.may_matter):
                for edges in found:
                    collector.add(edges)
                progress.advance(search.num_pairs(*tile))
                done += 1
                if done == total or pace.is_due():
                    with pace.saving():
                        save(done)

    search_share()  # what it has collected is gone before all parts are merged
    machine.barrier()
    found = share_arrays(machine, folder, finish)
    return Edges(*found[:3]), Edges(*found[3:]) if found[3:] else None


def _describe(tiles: Sequence[range]) -> npt.NDArray[np.int64]:
    return np.array([[part.start, part.stop, part.step] for part in tiles], np.int64)
