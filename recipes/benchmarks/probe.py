"""How fast and how right is the sweep of `eval-linear`? Beside scikit-learn's `LogisticRegression`, one fit for each C.

    python recipes/benchmarks/probe.py                      10,000 × 512 features, 100 classes: about 12 minutes on 2 cores
    python recipes/benchmarks/probe.py --images 2000 --classes 20 --width 128 --parts 1          a minute
    python recipes/benchmarks/probe.py --real               features of the shipped images by the shipped teacher

Synthetic features are clusters on the unit sphere: axes of falling variance, off the origin as CLIP's features are, classes
that overlap (accuracy on other images about 0.8). Both sides have the same threads and read the same file, each in a process
of its own, in turn: the values of C are dealt into parts, and in each part our whole sweep (from the features to 45
classifiers) is followed by scikit-learn's fits of the part's values. Its time is the sum over all parts, ours the median of
the sweeps.

- scikit-learn's solver is lbfgs, tol=1e-6, from zero for each C, as its users write it. It is timed in float32 by default,
  where it ends sooner (and at a larger gradient) than in float64. newton-cholesky would build the Hessian of all weights:
  for 100 classes × 513 that is 51,300² float64, 21 GB, and 4.5e13 operations to factor it, each iteration.
- The objective is mean cross-entropy + ‖W‖²/(2·C·N), computed for both in float64 from what they return.
- At C = 0.1, 1 and 10 scikit-learn is also run in float64, for objective and accuracy on 4,000 other images.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
from balance import describe_machine

CHECKED = (0.1, 1.0, 10.0)
TEST_IMAGES = 4_000
HERE = Path(__file__).resolve().parent


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--parts", type=int, default=3, help="how many turns the values of C are dealt into")
    parser.add_argument("--dtype", default="float32", help="what scikit-learn's sweep computes in")
    parser.add_argument("--prefix", default="", help="command that starts each side, such as 'taskset -c 0,1'")
    parser.add_argument("--scratch", type=Path, help="keep what each side made there, and go on after a stop")
    parser.add_argument("--real", action="store_true", help="features of the shipped images")
    parser.add_argument("--side", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side is not None:
        run_side(*arguments.side, threads=arguments.threads)
    else:
        print(describe_machine(arguments.threads))
        with tempfile.TemporaryDirectory() as scratch:
            folder = arguments.scratch or Path(scratch)
            folder.mkdir(parents=True, exist_ok=True)
            (compare_real if arguments.real else compare_synthetic)(folder, arguments)


def compare_synthetic(folder: Path, arguments: argparse.Namespace) -> None:
    """Print the sweep of both sides, then the checked values."""
    from clipcid_cli.algorithms.probe import regularisation_grid

    count = arguments.images + TEST_IMAGES
    rows, labels = make_features(count, arguments.width, arguments.classes, seed=0)
    train = slice(0, arguments.images)
    np.savez(folder / "data.npz", rows=rows[train], labels=labels[train])
    print(
        f"{arguments.images:,} × {arguments.width} synthetic features, {arguments.classes} classes; "
        f"scikit-learn's sweep in {arguments.dtype}"
    )
    grid = regularisation_grid()
    ours: list[Side] = []
    theirs: dict[float, tuple[float, npt.NDArray[Any], int]] = {}
    for part in range(arguments.parts):
        values = grid[part :: arguments.parts]
        mine = run(folder, f"part-{part + 1}-clipcid", arguments, grid, "float32")
        other = run(folder, f"part-{part + 1}-sklearn", arguments, values, arguments.dtype)
        ours.append(mine)
        theirs |= {c: (other.seconds[i], other.weights[i], other.iterations[i]) for i, c in enumerate(values)}
        print(
            f"part {part + 1}: our whole sweep {sum(mine.seconds):.1f} s, "
            f"scikit-learn's {len(values)} fits {sum(other.seconds):.1f} s",
            flush=True,
        )
    print(f"{'C':>8} {'ours':>12} {'scikit-learn':>12} {'ours/theirs-1':>13} {'iterations':>14} {'their s':>8}")
    worst = -np.inf
    for i, c in enumerate(grid):
        seconds, weights, iterations = theirs[c]
        reached = objective(rows[train], labels[train], ours[-1].weights[i], c)
        other_objective = objective(rows[train], labels[train], weights, c)
        excess = reached / other_objective - 1
        worst = max(worst, excess)
        print(
            f"{c:8.1e} {reached:12.8f} {other_objective:12.8f} {excess:+13.1e} {ours[-1].iterations[i]:6d} /{iterations:6d} "
            f"{seconds:8.1f}"
        )
    mine_seconds = median(sum(side.seconds) for side in ours)
    their_seconds = sum(seconds for seconds, _, _ in theirs.values())
    print(f"largest excess of our objective over theirs: {worst:+.1e} (equal is ≤ 1e-4)")
    ratio = their_seconds / mine_seconds
    print(f"whole sweep: ours {mine_seconds:.1f} s, scikit-learn {their_seconds:.1f} s: {ratio:.1f} times")
    theirs_checked = run(folder, "checked-sklearn", arguments, CHECKED, "float64")
    check((ours[-1], theirs_checked), rows[train], labels[train], rows[arguments.images :], labels[arguments.images :])


def compare_real(folder: Path, arguments: argparse.Namespace) -> None:
    """Print objective and accuracy on the features that the real command keeps."""
    from clipcid_cli.algorithms.probe import regularisation_grid

    quickstart = HERE.parent / "quickstart"
    command = ["eval-linear", str(quickstart / "teacher"), str(quickstart / "data" / "classification"), "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "clipcid_cli", *command, "--work", str(folder)],
        check=True,
        capture_output=True,
        text=True,
    )
    result = json.loads(done.stdout)
    kept = [np.load(path, allow_pickle=False) for path in (folder / "features").glob("*.npz")]
    train, test = (
        next(file for file in kept if len(file["rows"]) == result[count]) for count in ("train_images", "images")
    )
    np.savez(folder / "data.npz", rows=train["rows"], labels=train["labels"])
    print(
        f"{len(train['rows']):,} × {train['rows'].shape[1]} features of the shipped images by the shipped teacher, "
        f"{result['classes']} classes; the command chose C = {result['c']:.3g}, lp_acc1 {result['metrics']['lp_acc1']:.4f}"
    )
    ours = run(folder, "real-clipcid", arguments, regularisation_grid(), "float32")
    theirs = run(folder, "real-sklearn", arguments, CHECKED, "float64")
    check((ours, theirs), train["rows"], train["labels"], test["rows"], test["labels"])


def check(
    sides: tuple[Side, Side],
    rows: npt.NDArray[Any],
    labels: npt.NDArray[Any],
    test_rows: npt.NDArray[Any],
    test_labels: npt.NDArray[Any],
) -> None:
    """Print objective and accuracy of both sides at the checked values."""
    from clipcid_cli.algorithms.probe import regularisation_grid

    (ours, theirs), grid = sides, regularisation_grid()
    print("scikit-learn in float64, tol=1e-6:")
    print(
        f"{'C':>8} {'ours':>12} {'scikit-learn':>12} {'ours/theirs-1':>13} {'accuracy':>8} {'theirs':>8} {'their s':>8}"
    )
    for i, c in enumerate(CHECKED):
        place = min(range(len(grid)), key=lambda number: abs(grid[number] / c - 1))
        pair = (ours.weights[place], theirs.weights[i])
        mine, other = (objective(rows, labels, weights, c) for weights in pair)
        accuracy = [float((scores(test_rows, weights).argmax(1) == test_labels).mean()) for weights in pair]
        print(
            f"{c:8.1e} {mine:12.8f} {other:12.8f} {mine / other - 1:+13.1e} {accuracy[0]:8.4f} {accuracy[1]:8.4f} "
            f"{theirs.seconds[i]:8.1f}"
        )


class Side:
    """What one side made: seconds, iterations and [W, b] of each C."""

    def __init__(self, seconds: list[float], iterations: list[int], weights: npt.NDArray[Any]) -> None:
        self.seconds, self.iterations, self.weights = seconds, iterations, weights

    def write(self, path: Path) -> None:
        """Write it, whole or not at all."""
        unfinished = path.with_name(f".{path.name}")
        np.savez(unfinished, seconds=self.seconds, iterations=self.iterations, weights=self.weights)
        unfinished.replace(path)

    @staticmethod
    def read(path: Path) -> Side:
        """Read it."""
        with np.load(path, allow_pickle=False) as file:
            return Side(file["seconds"].tolist(), file["iterations"].tolist(), file["weights"])


def run(folder: Path, made: str, arguments: argparse.Namespace, values: Sequence[float], dtype: str) -> Side:
    """Run one side in a process of its own; ``made`` is where it writes, and its last word which side it is."""
    path = folder / f"{made}.npz"
    if not path.exists():
        listed = ",".join(repr(value) for value in values)
        command = [sys.executable, __file__, "--threads", str(arguments.threads)]
        command += ["--side", str(folder / "data.npz"), str(path), listed, dtype]
        subprocess.run([*shlex.split(arguments.prefix), *command], check=True, env=environment(arguments.threads))
    return Side.read(path)


def environment(threads: int) -> dict[str, str]:
    """Return the environment of a side: so many threads, which sleep while they wait."""
    limits = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    return os.environ | {"GOMP_SPINCOUNT": "0"} | dict.fromkeys(limits, str(threads))


def run_side(data: str, made: str, listed: str, dtype: str, *, threads: int) -> None:
    """Time one side and write what it made."""
    with np.load(data, allow_pickle=False) as file:
        rows, labels = file["rows"], file["labels"]
    if Path(made).stem.endswith("clipcid"):
        found = sweep_ours(rows, labels, threads)
    else:
        found = fit_theirs(rows.astype(dtype), labels, [float(value) for value in listed.split(",")])
    found.write(Path(made))


def sweep_ours(rows: npt.NDArray[Any], labels: npt.NDArray[Any], threads: int) -> Side:
    """Fit the whole grid as `eval-linear` does."""
    import torch

    from clipcid_cli.algorithms.probe import ProbeProblem, regularisation_grid, sweep_regularisation

    torch.set_num_threads(threads)
    seconds, iterations, weights = [], [], []
    start = time.perf_counter()
    problem = ProbeProblem(torch.from_numpy(rows), torch.from_numpy(labels), int(labels.max()) + 1)
    for solution in sweep_regularisation(problem, regularisation_grid()):
        seconds.append(time.perf_counter() - start)
        iterations.append(solution.iterations)
        weights.append(np.column_stack([solution.classifier.weights_CD.numpy(), solution.classifier.bias_C.numpy()]))
        start = time.perf_counter()
    return Side(seconds, iterations, np.stack(weights))


def fit_theirs(rows: npt.NDArray[Any], labels: npt.NDArray[Any], values: list[float]) -> Side:
    """Fit each value by scikit-learn."""
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    # float32 ends where its line search finds nothing lower, which scikit-learn warns of.
    warnings.simplefilter("ignore", ConvergenceWarning)
    seconds, iterations, weights = [], [], []
    for c in values:
        start = time.perf_counter()
        model = LogisticRegression(C=c, tol=1e-6, max_iter=10_000).fit(rows, labels)
        seconds.append(time.perf_counter() - start)
        iterations.append(int(model.n_iter_[0]))
        weights.append(np.column_stack([model.coef_, model.intercept_]))
    return Side(seconds, iterations, np.stack(weights).astype(np.float64))


def make_features(
    num_images: int, width: int, num_classes: int, seed: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Make unit rows in overlapping clusters."""
    random = np.random.default_rng(seed)
    axes = np.linalg.qr(random.normal(size=(width, width)))[0] * (1.0 + np.arange(width))[:, None] ** -0.5
    centroids, middle = random.normal(size=(num_classes, width)), random.normal(size=width)
    labels = random.integers(0, num_classes, num_images)
    rows = (middle + 0.21 * centroids[labels] + random.normal(size=(num_images, width))) @ axes
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows.astype(np.float32), labels


def scores(rows: npt.NDArray[Any], weights: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return logits in float64."""
    return np.asarray(rows.astype(np.float64) @ weights[:, :-1].T + weights[:, -1])


def objective(rows: npt.NDArray[Any], labels: npt.NDArray[Any], weights: npt.NDArray[Any], c: float) -> float:
    """Return scikit-learn's objective divided by C·N, in float64."""
    logits = scores(rows, weights)
    highest = logits.max(axis=1)
    total = highest + np.log(np.exp(logits - highest[:, None]).sum(axis=1))
    loss = (total - logits[np.arange(len(labels)), labels]).mean()
    return float(loss + np.square(weights[:, :-1]).sum() / (2 * c * len(labels)))


if __name__ == "__main__":
    main()
