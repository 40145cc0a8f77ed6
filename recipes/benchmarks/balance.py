"""How fast, how large and how right is `balance`? Beside exact search by faiss, and beside SemDeDup's rule.

    python recipes/benchmarks/balance.py                      N = 20,000 and 50,000, synthetic rows
    python recipes/benchmarks/balance.py --embeddings DIR     real rows, enlarged by noise
    python recipes/benchmarks/balance.py --rows 200000 1000000 --faiss-limit 200000 --repeat 1

For each N a folder of embeddings is written, and every side reads it in a process of its own, with the same number of
threads, one after another, in turn:

- clipcid: `clipcid balance --threshold ε`, the real command. Its time is `seconds.search`: from the mapped file to the
  forest, with everything that is exact about it; the whole command takes the time under `whole`.
- keep: the same command with `--keep`: it finds the cut-off as well.
- star: that one with `--linkage star`, and its ratio to `--keep` alone.
- faiss: `IndexFlatIP.range_search` of float32 rows against themselves, a little beyond ε, with the few pairs that float32
  cannot tell decided in float64, then SciPy's `connected_components`; reading is not counted. Its OpenBLAS may not know a
  newer processor and take a slow kernel: where there is AVX-512 it is told to take SkylakeX's, three times as fast, unless
  OPENBLAS_CORETYPE is set.
- SemDeDup (Abbas et al. 2023): k-means, then within each cluster each image against the earlier ones; see purity.py.

ε is put in the widest gap between forest edges near the asked share to keep.
Printed: seconds, ratio, peak memory above the embeddings' file, whether the partitions are equal, and the share of all pairs
within ε that a side looked at (edge recall).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

WIDTH = 512


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[20_000, 50_000])
    parser.add_argument("--keep", type=float, nargs="+", default=[0.8, 0.563, 0.3], help="shares to put cut-offs at")
    parser.add_argument("--embeddings", type=Path, help="folder of real embeddings to enlarge; synthetic without")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3, help="runs of each side, in turn; medians are printed")
    parser.add_argument("--faiss-limit", type=int, default=200_000, help="largest N that faiss is given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--side", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side is not None:
        run_side(*arguments.side)
        return
    print(describe_machine(arguments.threads))
    print(
        f"rows: {'synthetic' if arguments.embeddings is None else f'{arguments.embeddings}, enlarged'}, width {WIDTH}"
    )
    names = ("N", "keep", "cut-off", "side", "search s", "ratio", "whole s", "MB", "recall", "partition")
    print(" ".join(f"{name:>10}" for name in names))
    with tempfile.TemporaryDirectory() as scratch:
        growth: list[tuple[int, float]] = []
        for num_rows in arguments.rows:
            folder = Path(scratch) / str(num_rows)
            write_rows(folder, make_rows(num_rows, arguments.embeddings, arguments.seed))
            growth.append((num_rows, compare(folder, num_rows, arguments)))
        for (few, before), (many, after) in pairwise(growth):
            doublings = np.log2(many / few)
            print(
                f"from {few:,} to {many:,} rows: {(after / before) ** (1 / doublings):.2f} times the time per doubling"
            )


def compare(folder: Path, num_rows: int, arguments: argparse.Namespace) -> float:
    """Print the lines of one N; return clipcid's median time at the last cut-off."""
    forest = call_clipcid(folder, ["--keep", str(min(arguments.keep) * 0.9)], arguments.threads)
    sides = ["clipcid", *(["faiss", "SemDeDup"] if num_rows <= arguments.faiss_limit else [])]
    for keep in arguments.keep:
        cutoff = place_in_gap(forest["weights"], round((1 - keep) * num_rows))
        runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
        for _ in range(arguments.repeat):
            for side in sides:
                if side == "clipcid":
                    runs[side].append(call_clipcid(folder, ["--threshold", repr(cutoff)], arguments.threads))
                else:
                    runs[side].append(call_side(side, folder, cutoff, arguments.threads))
        own = median(run["seconds"] for run in runs["clipcid"])
        runs["keep"], runs["star"] = [], []
        for _ in range(arguments.repeat):
            runs["keep"].append(call_clipcid(folder, ["--keep", str(keep)], arguments.threads))
            runs["star"].append(call_clipcid(folder, ["--keep", str(keep), "--linkage", "star"], arguments.threads))
        alone = median(run["seconds"] for run in runs["keep"])
        for side, results in runs.items():
            taken, last = median(run["seconds"] for run in results), results[-1]
            beside = alone if side == "star" else own
            equal = np.array_equal(last["labels"], runs["clipcid"][-1]["labels"])
            columns = [
                f"{num_rows:,}",
                f"{len(np.unique(last['labels'])) / num_rows:.3f}",
                f"{cutoff:.5f}",
                side,
                f"{taken:.2f}",
                f"{taken / beside:.2f}",
                f"{median(run['whole'] for run in results):.2f}",
                f"{max(run['memory'] for run in results) / 2**20:,.0f}",
                f"{last['recall']:.4f}" if "recall" in last else "all",
                "" if side in ("keep", "star") else "equal" if equal else "differs",
            ]
            print(" ".join(f"{column:>10}" for column in columns), flush=True)
    return own


def make_rows(num_rows: int, embeddings: Path | None, seed: int) -> np.ndarray:
    """Make unit rows, float16 [num_rows, 512].

    Synthetic ones lie around N/4 centres, which lie around 64 topics; how far a row is from its centre varies evenly, so
    that there are sets at every cut-off. Real ones are turned into 512 dimensions and repeated with noise that varies alike.
    """
    generator = np.random.default_rng(seed)
    if embeddings is None:
        topics = unit(generator.standard_normal((64, WIDTH), dtype=np.float32))
        centres = unit(generator.standard_normal((num_rows // 4, WIDTH), dtype=np.float32))
        centres = unit(centres + topics[generator.integers(64, size=len(centres))])
    else:
        files = sorted((embeddings / "img_emb").glob("*.npy"))
        real = np.concatenate([np.load(path, allow_pickle=False) for path in files]).astype(np.float32)
        narrow, wide = sorted((WIDTH, real.shape[1]))
        turn, _ = np.linalg.qr(generator.standard_normal((wide, narrow)))
        centres = unit(real @ (turn if real.shape[1] == wide else turn.T).astype(np.float32))
    rows = np.empty((num_rows, WIDTH), np.float16)
    for start in range(0, num_rows, 65_536):
        part = rows[start : start + 65_536]
        near = centres[generator.integers(len(centres), size=len(part))]
        spread = generator.uniform(0.05, 0.8, size=(len(part), 1)).astype(np.float32) / WIDTH**0.5
        part[:] = unit(near + spread * generator.standard_normal(part.shape, dtype=np.float32))
    return rows


def unit(rows: np.ndarray) -> np.ndarray:
    """Scale rows to length 1."""
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def write_rows(folder: Path, rows: np.ndarray) -> None:
    """Write rows as embeddings of another tool."""
    (folder / "img_emb").mkdir(parents=True)
    np.save(folder / "img_emb" / "img_emb_0.npy", rows)


def place_in_gap(weights: np.ndarray, num_edges: int) -> float:
    """Return the middle of the widest gap between consecutive edges around the asked number of edges."""
    low, high = max(0, num_edges - 200), min(len(weights), num_edges + 200)
    near = weights[low:high].astype(np.float64)
    widest = int(np.argmax(np.diff(near)))
    return float(np.float32((near[widest] + near[widest + 1]) / 2))


def call_clipcid(folder: Path, amount: list[str], threads: int) -> dict[str, Any]:
    """Run the command in a fresh work directory; labels are each row's smallest row of its set."""
    import pandas as pd

    with tempfile.TemporaryDirectory() as work:
        command = ["clipcid", "balance", "--embeddings", str(folder), *amount, "--work", work, "--quiet", "--json"]
        answer, whole, memory = measure(command, threads)
        keep = pd.read_parquet(Path(work) / "balance" / "keep.parquet", columns=["component"])
        forest = pd.read_parquet(Path(work) / "balance" / "forest.parquet", columns=["distance"])
    return {
        "seconds": answer["seconds"]["search"],
        "whole": whole,
        "memory": memory - size_of(folder),
        "labels": keep["component"].to_numpy(),
        "weights": forest["distance"].to_numpy(),
    }


def call_side(side: str, folder: Path, cutoff: float, threads: int) -> dict[str, Any]:
    """Run another side in a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "labels.npy"
        command = [sys.executable, __file__, "--side", side, str(folder), repr(cutoff), str(out)]
        answer, whole, memory = measure(command, threads)
        return answer | {"whole": whole, "memory": memory - size_of(folder), "labels": np.load(out)}


def measure(command: list[str], threads: int) -> tuple[Any, float, int]:
    """Run a command; return its JSON, its wall-clock seconds and its peak memory in bytes."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "GOMP_SPINCOUNT": "0"}
    if "avx512f" in cpu_flags():
        environment.setdefault("OPENBLAS_CORETYPE", "SkylakeX")
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        answer = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return json.loads(answer), time.perf_counter() - began, usage.ru_maxrss * 1024


def run_side(side: str, folder: str, cutoff: str, out: str) -> None:
    """Measure faiss or SemDeDup: called in a process of its own; prints JSON."""
    rows = np.load(Path(folder) / "img_emb" / "img_emb_0.npy", allow_pickle=False).astype(np.float32)
    run = {"faiss": search_with_faiss, "SemDeDup": search_with_semdedup}[side]
    labels, answer = run(rows, float(cutoff))
    np.save(out, smallest_rows(labels))
    print(json.dumps(answer))


def search_with_faiss(rows: np.ndarray, cutoff: float) -> tuple[np.ndarray, dict[str, Any]]:
    """Label components of the graph of all pairs within a distance."""
    import faiss
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import connected_components

    began = time.perf_counter()
    index = faiss.IndexFlatIP(rows.shape[1])
    index.add(rows)
    # Rows stored in float16 are not quite of length 1, and float32 products not quite exact.
    limit, slack = 1.0 - cutoff**2 / 2.0, float(np.abs(np.einsum("nd,nd->n", rows, rows) - 1.0).max()) + 1e-5
    limits, score, found = index.range_search(rows, limit - slack)
    asked = np.repeat(np.arange(len(rows)), np.diff(limits.astype(np.int64)))
    keep = score >= limit + slack
    near = np.flatnonzero(~keep)
    for at in range(0, len(near), 8192):
        part = near[at : at + 8192]
        apart = rows[asked[part]].astype(np.float64) - rows[found[part]]
        keep[part] = np.sqrt((apart**2).sum(axis=1)).astype(np.float32) <= np.float32(cutoff)
    graph = csr_array((np.ones(int(keep.sum()), np.int8), (asked[keep], found[keep])), shape=(len(rows), len(rows)))
    _, labels = connected_components(graph, directed=False)
    return labels, {"seconds": time.perf_counter() - began, "recall": 1.0}


def search_with_semdedup(rows: np.ndarray, cutoff: float) -> tuple[np.ndarray, dict[str, Any]]:
    """Label sets by SemDeDup's rule; recall is the share of sampled pairs within ε that share a cluster."""
    import faiss
    from purity import prune, semdedup_clusters

    began = time.perf_counter()
    similarity, cluster = semdedup_clusters(rows, seed=0)
    nearest, to_nearest = prune(rows, similarity, cluster)
    stands_for = np.where(to_nearest >= 1.0 - cutoff**2 / 2.0, nearest, np.arange(len(rows)))
    while not np.array_equal(stands_for, stands_for[stands_for]):
        stands_for = stands_for[stands_for]
    seconds = time.perf_counter() - began
    index = faiss.IndexFlatIP(rows.shape[1])
    index.add(rows)
    sample = np.random.default_rng(0).choice(len(rows), min(len(rows), 5_000), replace=False)
    limits, _, found = index.range_search(rows[sample], 1.0 - cutoff**2 / 2.0)
    asked = np.repeat(sample, np.diff(limits.astype(np.int64)))
    other = asked != found
    return stands_for, {"seconds": seconds, "recall": float((cluster[asked] == cluster[found])[other].mean())}


def smallest_rows(labels: np.ndarray) -> np.ndarray:
    """Name each set by its smallest row."""
    _, first, position = np.unique(labels, return_index=True, return_inverse=True)
    return first[position]


def size_of(folder: Path) -> int:
    """Return the bytes of the embeddings."""
    return sum(path.stat().st_size for path in (folder / "img_emb").iterdir())


def cpu_flags() -> list[str]:
    """Return what the processor can do, as Linux names it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line for line in lines if line.startswith("flags")), "").split()


def describe_machine(threads: int) -> str:
    """Name the processor, its matrix units and the memory."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
    flags = cpu_flags()
    amx = "AMX bf16" if "amx_bf16" in flags else "AVX-512 VNNI, no AMX" if "avx512_vnni" in flags else "no AMX"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return (
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores of {model}, {amx}, {memory:.0f} GiB"
        + ("" if limit == resource.RLIM_INFINITY else f" (limit {limit / 2**30:.0f} GiB)")
        + f", {threads} threads a side"
    )


if __name__ == "__main__":
    main()
