"""From centroids to the table: the nearest centroids of every image and caption, and their totals."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from clipcid_cli.algorithms.kmeans.kmeans import temperature_for_perplexity
from clipcid_cli.algorithms.kmeans.top_nearest import top_nearest
from clipcid_cli.formats.embeddings.rows import Float16
from clipcid_cli.formats.results.clusters import (
    TopClusters,
    map_tops,
    part_bounds,
    part_path,
    read_label_parts,
    write_part,
)
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.runtime.threads import map_threads, threads_for_batches
from clipcid_cli.steps.cluster.rows import ClusterRows
from clipcid_cli.steps.reporting import Reporter

# Nearest centroids stored of each image and caption: docs/method.md#soft-labels.
NUM_NEAREST = 16
# Rows looked up together, at most and, on a CPU, at least; there a thread looks up a share of a part of the table.
_MOST_ROWS = {"cpu": 2048, "cuda": 8192}
_FEWEST_ROWS = 512
# The temperature's median is taken over about this many rows, evenly spaced: more would not change its digits.
_TEMPERATURE_ROWS = 65_536


def search_width(num_clusters: int) -> int:
    """Return m, the number of nearest centroids stored for each image."""
    return min(NUM_NEAREST, num_clusters)


@dataclasses.dataclass(frozen=True)
class _Block:
    """Rows that a thread looks up: images or captions of a part of the table.

    Attributes:
        read: Reads rows of the kind, by the first and the one after the last.
        last: Whether it is the last of its part.
    """

    part: int
    captions: bool
    read: Callable[[int, int], Float16]
    start: int
    stop: int
    last: bool


def assign_clusters(
    machine: Machine, rows: ClusterRows, centroids_KD: torch.Tensor, folder: Path, reporter: Reporter
) -> None:
    """Write the parts of the table that are not there yet, dealt to the processes."""
    bounds, m = part_bounds(len(rows)), search_width(len(centroids_KD))
    parts = range(machine.rank, len(bounds), machine.size)
    parts_left = [part for part in parts if not part_path(folder, part).exists()]
    threads = threads_for_batches(machine.device)

    def look_up(block: _Block) -> tuple[_Block, TopClusters, npt.NDArray[np.float64]]:
        rows_BD = torch.from_numpy(np.array(block.read(block.start, block.stop))).to(machine.device)
        found_Bm, exact_Bm = (found.cpu().numpy() for found in top_nearest(rows_BD, centroids_KD, m))
        return block, TopClusters(found_Bm.astype(np.int32), exact_Bm.astype(np.float16)), exact_Bm[:, 0].copy()

    own, left = (sum(stop - start for start, stop in map(bounds.__getitem__, each)) for each in (parts, parts_left))
    with reporter.progress("assign", own, "images") as progress:
        progress.advance(own - left)
        found: dict[bool, list[TopClusters]] = {False: [], True: []}
        exact: list[npt.NDArray[np.float64]] = []
        # One set of threads for all parts: new ones for each would share a core until the system has spread them.
        for block, tops, nearest_B in map_threads(_blocks(rows, parts_left, machine, threads), look_up, threads):
            found[block.captions].append(tops)
            if not block.captions:
                exact.append(nearest_B)
            if block.last:
                start, stop = bounds[block.part]
                write_part(
                    part_path(folder, block.part),
                    similarities=np.concatenate(exact),
                    images=_join(found[False]),
                    captions=_join(found[True]) if rows.embeddings.has_texts else None,
                )
                progress.advance(stop - start)
                found, exact = {False: [], True: []}, []
    machine.barrier()


def _blocks(rows: ClusterRows, parts: list[int], machine: Machine, threads: int) -> Iterator[_Block]:
    """Cut parts of the table into blocks, one part after another: its images, then its captions."""
    bounds, has_texts = part_bounds(len(rows)), rows.embeddings.has_texts
    for part in parts:
        start, stop = bounds[part]
        at_once = min(_MOST_ROWS[machine.device.type], max(_FEWEST_ROWS, -(-(stop - start) // threads)))
        for captions in (False, True) if has_texts else (False,):
            read = rows.captions if captions else rows.features
            for first in range(start, stop, at_once):
                last = min(stop, first + at_once)
                yield _Block(part, captions, read, first, last, captions == has_texts and last == stop)


def _join(tops: list[TopClusters]) -> TopClusters:
    return TopClusters(
        np.concatenate([top.clusters for top in tops]), np.concatenate([top.similarities for top in tops])
    )


def towers_of(rows: ClusterRows) -> tuple[str, ...]:
    """Return the towers whose nearest centroids are stored."""
    return ("image", "caption") if rows.embeddings.has_texts else ("image",)


def summarise(rows: ClusterRows, num_clusters: int, folder: Path) -> tuple[dict[str, Any], dict[str, float]]:
    """Return the counts and the objective of the result, and the temperatures, from the table and the arrays.

    Sums are taken in the order of the parts, which depends on the number of rows only.
    """
    totals: list[float] = []
    sizes = np.zeros(num_clusters, dtype=np.int64)
    for labels, similarities in read_label_parts(folder):
        totals.append(float(similarities.sum(dtype=np.float64)))
        sizes += np.bincount(labels, minlength=num_clusters)
    every = -(-len(rows) // _TEMPERATURE_ROWS)
    temperatures = {
        tower: temperature_for_perplexity(map_tops(folder, tower, len(rows)).similarities[::every])
        for tower in towers_of(rows)
    }
    result = {
        "images": len(rows),
        "clusters": num_clusters,
        "objective": math.fsum(totals) / len(rows),
        "empty_clusters": int((sizes == 0).sum()),
        "largest_cluster": int(sizes.max()),
        "skipped": rows.skips.counts,
    }
    return result, temperatures
