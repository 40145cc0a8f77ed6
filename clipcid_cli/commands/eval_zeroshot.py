"""`clipcid eval-zeroshot`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipcid_cli.commands.command import step_command
from clipcid_cli.steps.settings.eval_zeroshot import EvalZeroshotSettings

if TYPE_CHECKING:
    from rich.console import Console


def show(result: dict[str, Any], console: Console) -> None:
    """Print one line for each model on each data set, and where the metrics lie."""
    from rich.table import Table

    results = result.get("results", [result])
    measured = [one for one in results if "metrics" in one]
    for task in dict.fromkeys(one["task"] for one in measured):
        rows = [one for one in measured if one["task"] == task]
        table = Table(
            title=task.replace("_", " "), title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0)
        )
        table.add_column("model", style="cyan", overflow="fold")
        table.add_column("data", overflow="fold")
        columns = _columns(list(rows[0]["metrics"]))
        for title in [*columns, "images", "images/s"]:
            table.add_column(title, justify="right", no_wrap=True)
        for one in rows:
            # A folder is told by its short name; its path would take half the terminal.
            model = one["model"] if Path(one["pretrained"]).is_dir() else f"{one['model']} {one['pretrained']}"
            values = [" / ".join(_percent(one["metrics"][name]) for name in names) for names in columns.values()]
            table.add_row(model, one["dataset"], *values, f"{one['images']:,}", f"{one['images_per_second']:,.0f}")
        console.print(table)
    for one in results:
        console.print(f"metrics  {one['files']['metrics']}", style="dim", soft_wrap=True)


def _columns(names: list[str]) -> dict[str, list[str]]:
    """Put the recalls of one direction into one column, so that a table fits a terminal."""
    columns: dict[str, list[str]] = {}
    for name in names:
        direction, recall, _ = name.partition("_retrieval_recall@")
        at = "/".join(other.rpartition("@")[2] for other in names if other.startswith(direction + recall))
        title = f"{direction} R@{at}" if recall else name.replace("mean_per_class_recall", "per class")
        columns.setdefault(title, []).append(name)
    return columns


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


command = step_command(
    name="eval-zeroshot",
    settings=EvalZeroshotSettings,
    step="clipcid_cli.steps.eval_zeroshot",
    summary=show,
    help="Measure models on data sets without training: zero-shot classification, and retrieval between images and "
    "captions. Definitions, names and files are CLIP_benchmark's.",
    examples="clipcid eval-zeroshot\n"
    "clipcid eval-zeroshot ViT-B-32 food101/ mscoco/\n"
    "clipcid eval-zeroshot small/student photos/ --classnames names.txt --templates templates.txt\n"
    "clipcid eval-zeroshot ViT-B-32 food101/ --model ViT-L-14 --model small/student --json",
)
