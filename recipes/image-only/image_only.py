"""Train students with a text tower of their own and with the teacher's: python image_only.py --work DIRECTORY (see run.sh).

Data, teacher and student are the quickstart's, cut as the ablation cuts them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "ablation"))

from ablation import machine
from inputs import QUICKSTART, TEACHER, clipcid, cut_sets

SEEDS = (0, 1, 2)
KEPT = ("--text-tower", "teacher")
# How a student is trained: which of the teacher's rows it reads, and its flags.
KINDS = {
    "both towers": ("pairs", ()),
    "image tower": ("pairs", KEPT),
    "image tower, images alone": ("images", KEPT),
}
# What students are measured on, and what is known of it.
WORLDS = {
    "report-drawings-retrieval": "drawings that only the teacher was trained on",
    "report-concepts-retrieval": "concepts that nobody was trained on",
}
DIRECTIONS = ("image_retrieval_recall@", "text_retrieval_recall@")


def main() -> None:
    """Train and measure what is not there yet, and print means over the seeds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1_200)
    given = parser.parse_args()
    work = given.work.resolve()
    cut_sets(work)
    for rows, flags in (("pairs", ()), ("images", ("--no-text",))):
        clipcid("embed", work / "pairs", "--model", TEACHER, *flags, "--work", work / rows)
    students = {(kind, seed): train(work, kind, seed, given.steps) for kind in KINDS for seed in SEEDS}
    print(
        f"{given.steps:,} steps of 64, seeds {', '.join(map(str, SEEDS))}: R@1 and R@10 in %, mean of both directions."
    )
    for world, known in WORLDS.items():
        print(f"\n{known}\n{'student':28}{'R@1 of each seed':>22}{'mean':>7}{'R@10':>7}")
        measured = {kind: [measure(work, world, students[kind, seed]) for seed in SEEDS] for kind in KINDS}
        for kind, seeds in measured.items():
            print(show(kind, seeds))
        print(show("the teacher", [measure(work, world, TEACHER)]))
    print(f"\nMachine: {machine()}")


def train(work: Path, kind: str, seed: int, steps: int) -> Path:
    """Train a student, and return its folder."""
    rows, flags = KINDS[kind]
    name = f"{kind.replace(', ', '-').replace(' ', '-')}-{steps}-s{seed}"
    clipcid(
        "distill", work / "pairs", "--teacher", TEACHER, "--embeddings", work / rows / "embeddings" / "teacher",
        "--student", QUICKSTART / "student.json", "--preset", "fd-instance", *flags,
        "--steps", steps, "--batch-size", 64, "--seed", seed,
        "--eval-every", steps, "--checkpoint-every", steps, "--name", name, "--work", work / rows,
    )  # fmt: skip
    return work / rows / "distill" / name / "student"


def measure(work: Path, world: str, model: Path) -> dict[int, float]:
    """Return R@1 and R@10 of retrieval in %, the mean of images and texts."""
    metrics = clipcid("eval-zeroshot", model, work / "sets" / world, "--work", work / "measured")["metrics"]
    return {k: 100 * statistics.mean(metrics[f"{name}{k}"] for name in DIRECTIONS) for k in (1, 10)}


def show(name: str, seeds: list[dict[int, float]]) -> str:
    """Write a line of the table."""
    first = " ".join(f"{seed[1]:.1f}" for seed in seeds)
    means = [statistics.mean(seed[k] for seed in seeds) for k in (1, 10)]
    return f"{name:28}{first:>22}" + "".join(f"{mean:7.1f}" for mean in means)


if __name__ == "__main__":
    main()
