"""From centroids to the table: the nearest centroids of every image and caption, and their totals."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from clipcid_cli.algorithms.kmeans.kmeans import temperature_for_perplexity
from clipcid_cli.algorithms.near.nearest import top_nearest
from clipcid_cli.formats.arrays import save_arrays
from clipcid_cli.formats.results.clusters import map_tops, part_arrays, part_bounds, part_path, read_label_parts
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.runtime.pipeline import thread_map, threads_for_batches
from clipcid_cli.steps.cluster.rows import ClusterRows
from clipcid_cli.steps.reporting import Reporter

NUM_NEAREST = 16
# Rows that a thread looks up together.
_ROWS_AT_ONCE = {"cpu": 2048, "cuda": 8192}
# The temperature's median is taken over about this many rows, evenly spaced: more would not change its digits.
_TEMPERATURE_ROWS = 65_536


def search_width(num_clusters: int) -> int:
    """Return m, the number of nearest centroids stored of each image and caption: docs/method.md#soft-labels."""
    return min(NUM_NEAREST, num_clusters)


def towers_of(rows: ClusterRows) -> tuple[str, ...]:
    """Return the towers whose nearest centroids are stored."""
    return ("image", "caption") if rows.embeddings.has_texts else ("image",)


def assign_clusters(
    machine: Machine, rows: ClusterRows, centroids_KD: torch.Tensor, folder: Path, reporter: Reporter
) -> None:
    """Write the parts of the table that are not there yet, dealt to the processes."""
    bounds, m = part_bounds(len(rows)), search_width(len(centroids_KD))
    mine = range(machine.rank, len(bounds), machine.size)
    left = [part for part in mine if not part_path(folder, part).exists()]
    centroids_KD = centroids_KD.to(machine.device)
    readers, size = {"image": rows.features, "caption": rows.captions}, _ROWS_AT_ONCE[machine.device.type]
    blocks = (
        (part, first, min(first + size, bounds[part][1])) for part in left for first in range(*bounds[part], size)
    )

    def look_up(block: tuple[int, int, int]) -> tuple[int, dict[str, npt.NDArray[Any]]]:
        part, start, stop = block
        tops = {}
        for tower in towers_of(rows):
            rows_BD = torch.from_numpy(np.array(readers[tower](start, stop))).to(machine.device)
            found_Bm, cosine_Bm = top_nearest(rows_BD, centroids_KD, m)
            tops[tower] = found_Bm.cpu().numpy(), cosine_Bm.cpu().numpy()
        return part, part_arrays(tops)

    own, open_ = (sum(bounds[part][1] - bounds[part][0] for part in parts) for parts in (mine, left))
    with reporter.progress("assign", own, "images") as progress:
        progress.advance(own - open_)
        # One set of threads for all parts: new ones for each would share a core until the system has spread them.
        found = thread_map(look_up, blocks, threads_for_batches(machine.device))
        for part, blocks_of_part in itertools.groupby(found, key=lambda each: each[0]):
            pieces = [arrays for _, arrays in blocks_of_part]
            arrays = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
            save_arrays(part_path(folder, part), arrays)
            progress.advance(bounds[part][1] - bounds[part][0])
    machine.barrier()


def summarise(
    rows: ClusterRows, num_clusters: int, folder: Path
) -> tuple[float, npt.NDArray[np.int64], dict[str, float]]:
    """Return the objective, the images of each cluster, and the temperatures, from the table and the arrays.

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
    return math.fsum(totals) / len(rows), sizes, temperatures
