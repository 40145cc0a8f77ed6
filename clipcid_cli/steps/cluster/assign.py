"""From centroids to the table: the nearest centroids of every image and caption, and their totals."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from clipcid_cli.algorithms.kmeans.kmeans import temperature_for_perplexity
from clipcid_cli.algorithms.kmeans.top_nearest import top_nearest
from clipcid_cli.formats.embeddings.rows import Float16
from clipcid_cli.formats.results.clusters import TopClusters, map_tops, part_bounds, part_path, read_part, write_part
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


def assign_clusters(
    machine: Machine, rows: ClusterRows, centroids_KD: torch.Tensor, folder: Path, reporter: Reporter
) -> None:
    """Write the parts of the table that are not there yet, dealt to the processes."""
    bounds = part_bounds(len(rows))
    with reporter.progress("assign", len(rows), "images") as progress:
        for part, (start, stop) in enumerate(bounds):
            if part % machine.size == machine.rank and not part_path(folder, part).exists():
                images, exact = _find_top(machine, centroids_KD, rows.features, start, stop)
                captions = None
                if rows.embeddings.has_texts:
                    captions, _ = _find_top(machine, centroids_KD, rows.captions, start, stop)
                write_part(
                    part_path(folder, part),
                    keys=rows.keys(start, stop),
                    similarities=exact,
                    images=images,
                    captions=captions,
                )
            progress.advance(stop - start)
    machine.barrier()


def _find_top(
    machine: Machine, centroids_KD: torch.Tensor, read: Callable[[int, int], Float16], start: int, stop: int
) -> tuple[TopClusters, npt.NDArray[np.float64]]:
    """Find the nearest centroids of rows start … stop − 1, and the exact similarity to the first."""
    m = search_width(len(centroids_KD))
    clusters = np.empty((stop - start, m), dtype=np.int32)
    similarities = np.empty((stop - start, m), dtype=np.float64)

    threads = threads_for_batches(machine.device)
    at_once = min(_MOST_ROWS[machine.device.type], max(_FEWEST_ROWS, -(-(stop - start) // threads)))

    def look_up(first: int) -> None:
        last = min(stop, first + at_once)
        rows_BD = torch.from_numpy(np.array(read(first, last))).to(machine.device)
        found_Bm, exact_Bm = top_nearest(rows_BD, centroids_KD, m)
        mine = slice(first - start, last - start)
        clusters[mine], similarities[mine] = found_Bm.cpu().numpy(), exact_Bm.cpu().numpy()

    for _ in map_threads(range(start, stop, at_once), look_up, threads):
        pass
    return TopClusters(clusters, similarities.astype(np.float16)), similarities[:, 0]


def summarise(rows: ClusterRows, num_clusters: int, folder: Path) -> tuple[dict[str, Any], dict[str, float]]:
    """Return the counts and the objective of the result, and the temperatures, from the table and its parts.

    Sums are taken in the order of the parts, which depends on the number of rows only.
    """
    totals: list[float] = []
    sizes = np.zeros(num_clusters, dtype=np.int64)
    for number in range(len(part_bounds(len(rows)))):
        labels, similarities = read_part(part_path(folder, number))
        totals.append(float(similarities.sum(dtype=np.float64)))
        sizes += np.bincount(labels, minlength=num_clusters)
    every = -(-len(rows) // _TEMPERATURE_ROWS)
    prefixes = {"image": ""} | ({"caption": "caption_"} if rows.embeddings.has_texts else {})
    temperatures = {
        name: temperature_for_perplexity(map_tops(folder, prefix).similarities[::every])
        for name, prefix in prefixes.items()
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
