"""Print the quickstart's closing table from the files the steps left: python table.py WORK_DIRECTORY."""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

# Title in the table, slug in the metrics files, folder with the weights.
MODELS = (
    ("teacher", "teacher", "teacher"),
    ("student, taught", "taught-student", "{work}/distill/taught/student"),
    ("student, cid", "cid-student", "{work}/distill/cid/student"),
    ("student, alone", "alone-student", "{work}/distill/alone/student"),
)


def main() -> None:
    """Read the work directory and print what came out."""
    work = Path(sys.argv[1])
    console = Console()
    balance = read(work / "balance" / "balance.json")["result"]
    console.print(
        f"\n[bold]Images[/]: {balance['images']:,} before balancing, {balance['kept']:,} after"
        f" (kept {balance['keep_ratio']:.1%}, cut-off {balance['threshold']:.4f},"
        f" {balance['components']:,} sets, largest {balance['largest_component']})\n"
    )
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("model", no_wrap=True)
    for heading in ("params", "file MB", "images/s", "held-out\nR@1", "zero-shot\nacc1", "R@1", "probe\nacc1"):
        table.add_column(heading, justify="right")
    for title, slug, folder in MODELS:
        table.add_row(title, *model_row(work, slug, Path(folder.format(work=work))))
    console.print(table)
    console.print(f"\n{describe_held_out(work)}", highlight=False)
    console.print(
        "\nThe rest: classes and captions of emoji no model was trained on: 52 classes, 644 images; 344 images, a caption "
        "each.\n"
        "R@1 is the mean of image and text retrieval; images/s is fp32 evaluation of images with a caption each.\n"
        f"Machine: {machine()}\n\nReports:"
    )
    for report in (
        work / "balance/report.html",
        work / "distill/taught/report.html",
        work / "distill/cid/report.html",
        work / "distill/alone/report.html",
    ):
        console.print(f"  {report.resolve()}", highlight=False, soft_wrap=True)
    console.print(f"Exports:\n  {(work / 'export').resolve()}", highlight=False, soft_wrap=True)


def describe_held_out(work: Path) -> str:
    """Say what the held-out images are, and how far apart two students are on them."""
    compared = read(work / "taught-alone.json")
    gaps = []
    for kind in ("image", "text"):
        judged = compared["differences"][f"{kind}_retrieval_recall@1"]
        low, high = judged["interval"]
        gaps.append(f"{kind} {100 * judged['difference']:+.1f} points ({100 * low:.1f} … {100 * high:.1f})")
    return (
        f"Held-out: {compared['images']} images that the teacher was trained on, and no student.\n"
        f"Taught against alone, R@1 there with its 95 % interval: {', '.join(gaps)}."
    )


def model_row(work: Path, slug: str, folder: Path) -> list[str]:
    """Return the cells of one model."""
    zeroshot, _ = metrics(work, "classification", slug, "zeroshot_classification")
    # The second data set of each model: its first one also pays for starting workers and kernels.
    retrieval, rate = metrics(work, "retrieval", slug, "zeroshot_retrieval")
    probe, _ = metrics(work, "classification", slug, "linear_probe")
    held_out, _ = metrics(work, "pairs-held-out", slug, "zeroshot_retrieval")
    weights = folder / "open_clip_model.safetensors"
    return [
        f"{count_parameters(weights) / 1e6:.1f} M",
        f"{weights.stat().st_size / 1e6:.1f}",
        f"{rate:,.0f}",
        f"{mean_recall(held_out):.3f}",
        f"{zeroshot['acc1']:.3f}",
        f"{mean_recall(retrieval):.3f}",
        f"{probe['lp_acc1']:.3f}",
    ]


def mean_recall(of: dict[str, float]) -> float:
    """Return the mean of image and text R@1."""
    return (of["image_retrieval_recall@1"] + of["text_retrieval_recall@1"]) / 2


def metrics(work: Path, dataset: str, slug: str, task: str) -> tuple[dict[str, float], float]:
    """Return the metrics of a model on a data set, and the images a second they were measured at."""
    stem = f"{dataset}_{slug}_{task}"
    sidecar = read(work / "eval" / "sidecars" / f"{stem}.json")
    return read(work / "eval" / f"{stem}.json")["metrics"], sidecar.get("images_per_second", 0.0)


def count_parameters(weights: Path) -> int:
    """Count the numbers in a safetensors file from its header."""
    with weights.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    total = 0
    for name, entry in header.items():
        if name != "__metadata__":
            size = 1
            for extent in entry["shape"]:
                size *= extent
            total += size
    return total


def machine() -> str:
    """Describe the processor: its model and what of its instructions matters here."""
    name, flags = platform.processor() or platform.machine(), ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = dict(line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line)
        fields = {key.strip(): value.strip() for key, value in lines.items()}
        name = fields.get("model name", name)
        flags = ", AMX" if "amx_bf16" in fields.get("flags", "") else ""
    return f"{os.cpu_count()} cores of {name}{flags}"


def read(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
