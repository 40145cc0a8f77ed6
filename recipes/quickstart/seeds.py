"""Compare students with and without a teacher over seeds: python seeds.py WORK_DIRECTORY (see seeds.sh)."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

from table import machine

SEEDS = (0, 1, 2)
# Heading, data set, task, names of the metrics that are averaged.
COLUMNS = (
    ("zero-shot acc1", "classification", "zeroshot_classification", ("acc1",)),
    ("retrieval R@1", "retrieval", "zeroshot_retrieval", ("image_retrieval_recall@1", "text_retrieval_recall@1")),
    ("retrieval R@10", "retrieval", "zeroshot_retrieval", ("image_retrieval_recall@10", "text_retrieval_recall@10")),
    ("probe acc1", "classification", "linear_probe", ("lp_acc1",)),
)


def main() -> None:
    """Print, for each metric, every seed, mean and standard deviation, and the paired difference."""
    eval_folder = Path(sys.argv[1]) / "eval"
    print(
        "Emoji no model was trained on; 1,200 steps of 64 on the same images, seeds 0, 1, 2: values, mean ± deviation."
    )
    for heading, dataset, task, names in COLUMNS:
        taught = [value(eval_folder, dataset, f"taught-{seed}-student", task, names) for seed in SEEDS]
        alone = [value(eval_folder, dataset, f"alone-{seed}-student", task, names) for seed in SEEDS]
        gains = [with_teacher - without for with_teacher, without in zip(taught, alone, strict=True)]
        print(f"{heading:15} taught {show(taught)}   alone {show(alone)}   gain {show(gains)}")
    print(f"Machine: {machine()}")


def value(folder: Path, dataset: str, model: str, task: str, names: tuple[str, ...]) -> float:
    """Return the mean of the named metrics of one file."""
    metrics = json.loads((folder / f"{dataset}_{model}_{task}.json").read_text(encoding="utf-8"))["metrics"]
    return statistics.mean(metrics[name] for name in names)


def show(values: list[float]) -> str:
    """Write values, mean and standard deviation."""
    each = " ".join(f"{value:+.3f}" if min(values) < 0 else f"{value:.3f}" for value in values)
    return f"{each} | {statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


if __name__ == "__main__":
    main()
