"""How fast and how good is `cluster`, compared with faiss.Kmeans and scikit-learn's MiniBatchKMeans?

    python recipes/benchmarks/cluster.py                                    four kinds of rows, 3 seeds
    python recipes/benchmarks/cluster.py --embeddings DIR --kinds real      real rows, enlarged by noise
    python recipes/benchmarks/cluster.py --memory 1000000 64 300000         peak memory of N rows of width D in K clusters

The sides read the same folder, each in a process of its own, with the same number of threads, one after another:

- clipcid: `clipcid cluster`, the real command. Its time is `seconds.kmeans`: reading, first centroids, all iterations with a
  checkpoint after each; the whole command, with the 16 nearest centroids of each row found and written, is under `whole s`.
- faiss: `faiss.Kmeans(spherical=True, nredo=1)` on all rows in float32, no subsampling; its time is `train`. Both
  end when no centroid moves any more. As in balance.py its OpenBLAS uses SkylakeX's kernels where there is
  AVX-512, three times as fast as those it chooses itself, and its waiting threads sleep (GOMP_SPINCOUNT=0), which makes
  it faster and clipcid slower.
- scikit-learn: `MiniBatchKMeans`, batches of 4,096, as many passes as faiss has iterations at most (it may stop earlier);
  its centroids are normalised at the end.

The objective is the mean similarity of all rows to their nearest centroid, computed in the same way from each side's
centroids.

Kinds of rows: `random`, no structure at all; `mixture`, N/25 groups around 64 topics; `spectrum`, one cloud without gaps
whose variances fall as a power law, where k-means converges slowest; `real`, the rows of `--embeddings` repeated with noise.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
from balance import WIDTH, describe_machine, make_rows, measure, unit, write_rows


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--num-clusters", type=int, default=4096)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", default=["random", "mixture", "spectrum"])
    parser.add_argument("--embeddings", type=Path, help="folder of real embeddings to enlarge, for the kind `real`")
    parser.add_argument(
        "--sklearn-seeds", type=int, default=1, help="seeds that scikit-learn, the slowest, is run with"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", type=int, nargs=3, metavar=("N", "D", "K"), help="measure memory only")
    parser.add_argument("--side", nargs=6, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side is not None:
        run_side(*arguments.side)
        return
    print(describe_machine(arguments.threads))
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.memory is not None:
            measure_memory(Path(scratch), *arguments.memory, arguments.iterations)
            return
        print(
            f"N = {arguments.rows:,}, D = {WIDTH}, K = {arguments.num_clusters:,}, {arguments.iterations} iterations",
            flush=True,
        )
        names = ("rows", "seed", "side", "k-means s", "ratio", "whole s", "MB", "objective", "to faiss", "iterations")
        print(" ".join(f"{name:>12}" for name in names))
        for kind in arguments.kinds:
            ratios, qualities = [], []
            for seed in range(arguments.seeds):
                folder = Path(scratch) / f"{kind}-{seed}"
                write_rows(folder, make(kind, arguments.rows, arguments.embeddings, seed))
                ratio, quality = compare(kind, folder, seed, arguments)
                ratios.append(ratio)
                qualities.append(quality)
            print(
                f"{kind}: faiss takes {median(ratios):.1f} times as long (median; {min(ratios):.1f} to {max(ratios):.1f}), "
                f"clipcid's objective is at least {min(qualities):.4f} times its",
                flush=True,
            )


def make(kind: str, num_rows: int, embeddings: Path | None, seed: int) -> np.ndarray:
    """Make unit rows, float16 [num_rows, 512]."""
    if kind == "real" and embeddings is None:
        raise SystemExit("--kinds real needs --embeddings")
    if kind == "real":
        return make_rows(num_rows, embeddings, seed)
    generator = np.random.default_rng(seed)
    if kind == "mixture":
        topics = unit(generator.standard_normal((64, WIDTH), dtype=np.float32))
        groups = unit(generator.standard_normal((num_rows // 25, WIDTH), dtype=np.float32))
        groups = unit(groups + topics[generator.integers(64, size=len(groups))])
    spread = np.arange(1, WIDTH + 1, dtype=np.float32) ** -0.75
    turn = np.linalg.qr(generator.standard_normal((WIDTH, WIDTH)))[0].astype(np.float32)
    rows = np.empty((num_rows, WIDTH), np.float16)
    for start in range(0, num_rows, 65_536):
        part = rows[start : start + 65_536]
        noise = generator.standard_normal(part.shape, dtype=np.float32)
        if kind == "spectrum":
            noise = noise * spread @ turn
        elif kind == "mixture":
            scale = generator.uniform(0.1, 1.2, size=(len(part), 1)).astype(np.float32) / WIDTH**0.5
            noise = groups[generator.integers(len(groups), size=len(part))] + scale * noise
        elif kind != "random":
            raise SystemExit(f"no such kind of rows: {kind}")
        part[:] = unit(noise)
    return rows


def compare(kind: str, folder: Path, seed: int, arguments: argparse.Namespace) -> tuple[float, float]:
    """Print the lines of one seed; return how many times as long faiss takes, and clipcid's objective over its."""
    rows = np.load(folder / "img_emb" / "img_emb_0.npy", mmap_mode="r")
    sides = ["clipcid", "faiss", *(["scikit-learn"] if seed < arguments.sklearn_seeds else [])]
    runs = {}
    for side in sides:
        with tempfile.TemporaryDirectory() as out:
            counts = [str(arguments.num_clusters), str(arguments.iterations), str(seed)]
            if side == "clipcid":
                command = ["env", "-u", "GOMP_SPINCOUNT", "clipcid", "cluster", "--embeddings", str(folder)]
                command += ["--work", out, "--quiet", "--json"]
                command += ["--num-clusters", counts[0], "--iterations", counts[1], "--seed", counts[2]]
            else:
                command = [sys.executable, __file__, "--side", side, str(folder), *counts, f"{out}/centroids.npy"]
            answer, whole, memory = measure(command, arguments.threads)
            place = Path(out) / ("clusters/centroids.npy" if side == "clipcid" else "centroids.npy")
            runs[side] = {
                "seconds": answer["seconds"]["kmeans"],
                "iterations": answer["iterations"],
                "whole": whole,
                "memory": memory,
                "objective": mean_similarity(rows, np.load(place)),
            }
    for side, run in runs.items():
        columns = [
            kind,
            str(seed),
            side,
            f"{run['seconds']:.2f}",
            f"{run['seconds'] / runs['clipcid']['seconds']:.2f}",
            f"{run['whole']:.2f}",
            f"{run['memory'] / 2**20:,.0f}",
            f"{run['objective']:.5f}",
            f"{run['objective'] / runs['faiss']['objective']:.4f}",
            str(run["iterations"]),
        ]
        print(" ".join(f"{column:>12}" for column in columns), flush=True)
    own, other = runs["clipcid"], runs["faiss"]
    return other["seconds"] / own["seconds"], own["objective"] / other["objective"]


def mean_similarity(rows: np.ndarray, centroids: np.ndarray) -> float:
    """Return the mean similarity of rows to their nearest centroid."""
    blocks = [rows[start : start + 4096].astype(np.float32) for start in range(0, len(rows), 4096)]
    return float(sum((block @ centroids.T).max(axis=1).sum(dtype=np.float64) for block in blocks) / len(rows))


def run_side(side: str, folder: str, num_clusters: str, iterations: str, seed: str, out: str) -> None:
    """Measure faiss or scikit-learn: called in a process of its own; prints JSON."""
    rows = np.load(Path(folder) / "img_emb" / "img_emb_0.npy", allow_pickle=False).astype(np.float32)
    run = {"faiss": cluster_with_faiss, "scikit-learn": cluster_with_sklearn}[side]
    began = time.perf_counter()
    centroids, done = run(rows, int(num_clusters), int(iterations), int(seed))
    np.save(out, centroids)
    print(json.dumps({"seconds": {"kmeans": time.perf_counter() - began}, "iterations": done}))


def cluster_with_faiss(rows: np.ndarray, num_clusters: int, iterations: int, seed: int) -> tuple[np.ndarray, int]:
    """Run faiss's k-means on all rows."""
    import faiss

    options = {"spherical": True, "nredo": 1, "min_points_per_centroid": 1, "max_points_per_centroid": len(rows)}
    kmeans = faiss.Kmeans(rows.shape[1], num_clusters, niter=iterations, seed=seed, **options)
    kmeans.train(rows)
    # It ends early where an iteration changes nothing.
    return kmeans.centroids, len(kmeans.obj)


def cluster_with_sklearn(rows: np.ndarray, num_clusters: int, iterations: int, seed: int) -> tuple[np.ndarray, int]:
    """Run scikit-learn's k-means on batches."""
    from sklearn.cluster import MiniBatchKMeans

    kmeans = MiniBatchKMeans(
        num_clusters, init="random", n_init=1, batch_size=4096, max_iter=iterations, random_state=seed
    ).fit(rows)
    return unit(kmeans.cluster_centers_), int(kmeans.n_iter_)


def measure_memory(scratch: Path, num_rows: int, width: int, num_clusters: int, iterations: int) -> None:
    """Print what `--dry-run` estimates of a large run, and what the run then takes."""
    generator = np.random.default_rng(0)
    rows = np.empty((num_rows, width), np.float16)
    for start in range(0, num_rows, 65_536):
        part = rows[start : start + 65_536]
        part[:] = unit(generator.standard_normal(part.shape, dtype=np.float32))
    write_rows(scratch / "emb", rows)
    del rows
    command = ["clipcid", "cluster", "--embeddings", str(scratch / "emb"), "--work", str(scratch / "work"), "--json"]
    command += ["--num-clusters", str(num_clusters), "--iterations", str(iterations)]
    estimate = json.loads(subprocess.run([*command, "--dry-run"], stdout=subprocess.PIPE, check=True).stdout)
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"GOMP_SPINCOUNT": "0"}) as process:
        peak = 0
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text()
            anonymous = [int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")]
            peak = max([peak, *anonymous])
            time.sleep(0.02)
        assert process.stdout is not None
        answer = json.loads(process.stdout.read())
    print(
        f"N = {num_rows:,}, D = {width}, K = {num_clusters:,}, {answer['iterations']} iterations: peak RssAnon "
        f"{peak / 2**20:.2f} GiB, {estimate['memory_bytes'] / 2**30:.2f} estimated by --dry-run; seconds "
        f"{answer['seconds']}"
    )


if __name__ == "__main__":
    main()
