"""How long does `cluster` take to find the 16 nearest centroids of each row, compared with faiss's flat search?

    python recipes/benchmarks/assignment.py                     four kinds of rows and sizes
    python recipes/benchmarks/assignment.py --cases 1           the first of them

Ours is `top` on blocks of 2,048 rows by one set of threads, as `cluster` calls it. Theirs is `faiss.knn` of 16, all rows at
once. Both begin with the same float16 rows in memory and alternate in one process; printed are medians of seconds and of
processor seconds, and their ratios.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from functools import partial
from statistics import median

os.environ.setdefault("GOMP_SPINCOUNT", "0")  # before libraries: waiting threads of one must not slow the other's

import faiss
import torch
from balance import describe_machine

from clipcid_cli.algorithms.kmeans.centroids import centroids_of_sums
from clipcid_cli.algorithms.near.nearest import top
from clipcid_cli.runtime.pipeline import thread_map

CASES = [
    ("random", 200_000, 192, 1024),
    ("clustered", 100_000, 512, 4096),
    ("cone", 100_000, 512, 1024),
    ("random", 50_000, 768, 4096),
]
NEAREST, BLOCK = 16, 2048


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--cases", type=int, nargs="+", choices=range(1, len(CASES) + 1), help="some of the lines alone"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(describe_machine(arguments.threads))
    names = ("rows", "N", "D", "K", "clipcid s", "faiss s", "ratio", "clipcid cpu", "faiss cpu", "ratio")
    print(" ".join(f"{name:>11}" for name in names))
    for case in arguments.cases or range(1, len(CASES) + 1):
        kind, num_rows, width, num_centroids = CASES[case - 1]
        rows, centroids = make(kind, num_rows, width, num_centroids)
        sides = {
            "clipcid": partial(ours, rows, centroids, arguments.threads),
            "faiss": partial(theirs, rows, centroids),
        }
        taken: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
        for _ in range(arguments.runs + 1):
            for side, run in sides.items():
                taken[side].append(measure(run))
        columns = [kind, f"{num_rows:,}", str(width), f"{num_centroids:,}"]
        for kind_of_seconds in range(2):
            # The first run loads libraries and starts threads.
            own, other = (median(run[kind_of_seconds] for run in taken[side][1:]) for side in sides)
            columns += [f"{own:.2f}", f"{other:.2f}", f"{own / other:.2f}"]
        print(" ".join(f"{column:>11}" for column in columns), flush=True)


def make(kind: str, num_rows: int, width: int, num_centroids: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Make unit rows, float16 [N, D], and centroids, float32 [K, D]."""
    random = torch.Generator().manual_seed(0)
    centroids = unit(torch.randn(num_centroids, width, generator=random))
    rows = torch.randn(num_rows, width, generator=random)
    if kind == "cone":
        centroids = centroids / 2 + centroids[:1]
        rows = rows / width**0.5 / 2 + centroids[:1]
    elif kind == "clustered":
        rows = 0.7 * rows / width**0.5 + centroids[torch.randint(num_centroids, (num_rows,), generator=random)]
    return unit(rows).half(), centroids_of_sums(centroids.double(), torch.zeros(centroids.shape))


def unit(rows: torch.Tensor) -> torch.Tensor:
    """Normalise rows."""
    return torch.nn.functional.normalize(rows, dim=1)


def measure(run: Callable[[], None]) -> tuple[float, float]:
    """Return seconds and processor seconds."""
    wall, processor = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - processor


def ours(rows: torch.Tensor, centroids: torch.Tensor, threads: int) -> None:
    """Look up all rows as `cluster` does."""
    for _ in thread_map(lambda block: top(block, centroids, NEAREST), torch.split(rows, BLOCK), threads):
        pass


def theirs(rows: torch.Tensor, centroids: torch.Tensor) -> None:
    """Look up all rows with faiss."""
    faiss.omp_set_num_threads(torch.get_num_threads())
    faiss.knn(rows.float().numpy(), centroids.numpy(), NEAREST, metric=faiss.METRIC_INNER_PRODUCT)


if __name__ == "__main__":
    main()
