"""`clipcid eval-zeroshot`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipcid_cli.commands.command import step_command
from clipcid_cli.steps.settings.eval_zeroshot import EvalZeroshotSettings

if TYPE_CHECKING:
    from rich.console import Console


def show(result: dict[str, Any], console: Console) -> None:
    """Print one line for each model on each data set, and where the files lie; of a comparison its verdicts."""
    if "differences" in result:
        _show_comparison(result, console)
        return
    results = result.get("results", [result])
    measured = [one for one in results if "metrics" in one]
    # Tables of one task may differ in their metrics: data with several classes an image has its own.
    for names in dict.fromkeys((one["task"], tuple(one["metrics"])) for one in measured):
        _show_table([one for one in measured if (one["task"], tuple(one["metrics"])) == names], console)
    for one in results:
        for kind in ("metrics", "predictions"):
            if kind in one["files"]:
                console.print(f"{kind:<12}{one['files'][kind]}", style="dim", soft_wrap=True)
    files = result.get("files", {})
    for kind in ("table", "report"):
        if kind in files:
            console.print(f"{kind:<12}{files[kind]}", style="dim", soft_wrap=True)


def _show_table(rows: list[dict[str, Any]], console: Console) -> None:
    from rich.table import Table

    table = Table(
        title=rows[0]["task"].replace("_", " "),
        title_justify="left",
        title_style="bold",
        box=None,
        padding=(0, 2, 0, 0),
    )
    table.add_column("model", style="cyan", overflow="fold")
    table.add_column("data", overflow="fold")
    columns = _columns(list(rows[0]["metrics"]))
    for title in [*columns, "images", "images/s"]:
        table.add_column(title, justify="right", no_wrap=True)
    for one in rows:
        # A folder is told by its short name; its path would take half the terminal.
        model = one["model"] if Path(one["pretrained"]).is_dir() else f"{one['model']} {one['pretrained']}"
        values = [_cell(one, names) for names in columns.values()]
        table.add_row(model, one["dataset"], *values, f"{one['images']:,}", f"{one['images_per_second']:,.0f}")
    console.print(table)
    note = "* what this data is usually reported by"
    if any(len(names) == 1 and names[0] in one["intervals"] for names in columns.values() for one in rows):
        note += "; ± half the 95 % interval, from drawing the images anew"
    console.print(note, style="dim")


def _cell(one: dict[str, Any], names: list[str]) -> str:
    """Write the values of one column, the customary one with a star; a single one with half its interval."""
    if len(names) > 1:
        return " / ".join(_percent(one["metrics"][name]) + "*" * (name == one["customary"]) for name in names)
    text = _percent(one["metrics"][names[0]])
    if one["metrics"][names[0]] is None:
        return text
    bounds = one["intervals"].get(names[0])
    half = f" ±{50 * (bounds[1] - bounds[0]):.1f}" if bounds is not None else ""
    return f"{text}{half}{'*' if names[0] == one['customary'] else ' '}"


def _show_comparison(result: dict[str, Any], console: Console) -> None:
    from rich.table import Table

    console.print(f"A  {result['compared'][0]}\nB  {result['compared'][1]}", style="dim", soft_wrap=True)
    table = Table(
        title=f"B against A on {result['dataset']}, {result['images']:,} images",
        title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0),
    )  # fmt: skip
    table.add_column("metric", overflow="fold")
    for title in ("A", "B", "B − A", "95 % interval", "McNemar p", "real?"):
        table.add_column(title, justify="right", no_wrap=True)
    for name, judged in result["differences"].items():
        low, high = judged["interval"]
        table.add_row(
            name.replace("mean_per_class_recall", "per class").replace("_retrieval_recall@", " R@"),
            _percent(judged["first"]),
            _percent(judged["second"]),
            f"{100 * judged['difference']:+.2f}",
            f"{100 * low:+.2f} … {100 * high:+.2f}",
            "–" if judged["p_value"] is None else f"{judged['p_value']:.2g}",
            "yes" if judged["real"] else "no",
        )
    console.print(table)


def _columns(names: list[str]) -> dict[str, list[str]]:
    """Put the recalls of one direction into one column, so that a table fits a terminal."""
    titles = {
        "mean_per_class_recall": "per class",
        "mean_average_precision": "mAP",
        "mean_average_precision_11_point": "mAP 11-point",
    }
    columns: dict[str, list[str]] = {}
    for name in names:
        direction, recall, _ = name.partition("_retrieval_recall@")
        at = "/".join(other.rpartition("@")[2] for other in names if other.startswith(direction + recall))
        title = f"{direction} R@{at}" if recall else titles.get(name, name)
        columns.setdefault(title, []).append(name)
    return columns


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


command = step_command(
    name="eval-zeroshot",
    settings=EvalZeroshotSettings,
    step="clipcid_cli.steps.evaluate.zeroshot",
    summary=show,
    help="Measure models on data sets without training: zero-shot classification, and retrieval between images and "
    "captions. Definitions, names and files are CLIP_benchmark's.",
    examples="clipcid eval-zeroshot\n"
    "clipcid eval-zeroshot ViT-B-32 food101/ mscoco/\n"
    "clipcid eval-zeroshot small/student photos/ --classnames names.txt --templates templates.txt\n"
    "clipcid eval-zeroshot ViT-B-32 food101/ --model ViT-L-14 --model small/student --json\n"
    "clipcid eval-zeroshot ViT-B-32 imagenet pets voc2007 --data-root /data/clip_benchmark --predictions\n"
    "clipcid eval-zeroshot --compare eval/pets_A_zeroshot_classification.json eval/pets_B_zeroshot_classification.json",
)
