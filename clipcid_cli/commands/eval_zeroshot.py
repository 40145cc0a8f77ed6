"""`clipcid eval-zeroshot`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from clipcid_cli.commands.command import step_command
from clipcid_cli.commands.summary import count, file_facts, format_percent, print_facts, print_table, shorten_metric
from clipcid_cli.commands.wrapping import wrap
from clipcid_cli.steps.settings.eval_zeroshot import EvalZeroshotSettings

if TYPE_CHECKING:
    from rich.console import Console


def show(result: dict[str, Any], console: Console) -> None:
    """Print one line for each model on each data set, and where the files are; of a comparison its verdicts."""
    if "differences" in result:
        _show_comparison(result, console)
        return
    results = result.get("results", [result])
    measured = [one for one in results if "metrics" in one]
    # Tables of one task may differ in their metrics: data with several classes an image has its own.
    for names in dict.fromkeys((one["task"], tuple(one["metrics"])) for one in measured):
        _show_table([one for one in measured if (one["task"], tuple(one["metrics"])) == names], console)
        console.print()
    kinds = ("metrics", "predictions")
    files = {kind: "\n".join(one["files"][kind] for one in results if kind in one["files"]) for kind in kinds}
    files |= {name: path for name, path in file_facts(result).items() if name not in kinds}
    print_facts(console, "", {name: paths for name, paths in files.items() if paths})


def _show_table(rows: list[dict[str, Any]], console: Console) -> None:
    metrics = _columns(list(rows[0]["metrics"]))
    title = rows[0]["task"].replace("_", " ").replace("zeroshot", "zero-shot").capitalize()
    columns: dict[str, list[str]] = {}
    # A folder is shown by its short name; its path would take half the terminal.
    models = [
        one["model"] if Path(one["pretrained"]).is_dir() else f"{one['model']} {one['pretrained']}" for one in rows
    ]
    for name, word, values in (("model", "of", models), ("data", "on", [one["dataset"] for one in rows])):
        if len(set(values)) == 1:
            title += f" {word} {values[0]}"
        else:
            columns[name] = values
    left = len(columns)
    columns |= {column: [_cell(one, names) for one in rows] for column, names in metrics.items()}
    columns["images"] = [f"{one['images']:,}" for one in rows]
    columns["images/s"] = [f"{one['images_per_second']:,.0f}" for one in rows]
    print_table(console, title, list(columns), list(zip(*columns.values(), strict=True)), left=left)
    note = "* the metric usually reported for this data"
    if any(len(names) == 1 and names[0] in one["intervals"] for names in metrics.values() for one in rows):
        note += "; ± half the 95% bootstrap interval"
    console.print(Text(wrap(note, console.width), style="dim"), soft_wrap=True)


def _cell(one: dict[str, Any], names: list[str]) -> str:
    """Write the values of one column, the customary one with a star; a single one with half its interval."""
    if len(names) > 1:
        return " / ".join(format_percent(one["metrics"][name]) + "*" * (name == one["customary"]) for name in names)
    text = format_percent(one["metrics"][names[0]])
    if one["metrics"][names[0]] is None:
        return text
    bounds = one["intervals"].get(names[0])
    half = f" ±{50 * (bounds[1] - bounds[0]):.1f}" if bounds is not None else ""
    return f"{text}{half}{'*' if names[0] == one['customary'] else ' '}"


def _show_comparison(result: dict[str, Any], console: Console) -> None:
    print_facts(console, "", dict(zip("AB", result["compared"], strict=True)))
    rows = []
    for name, judged in result["differences"].items():
        low, high = judged["interval"]
        rows.append(
            (
                shorten_metric(name),
                format_percent(judged["first"]),
                format_percent(judged["second"]),
                f"{100 * judged['difference']:+.2f}",
                f"{100 * low:+.2f} … {100 * high:+.2f}",
                "–" if judged["p_value"] is None else f"{judged['p_value']:.2g}",
                "yes" if judged["real"] else "no",
            )
        )
    title = f"B against A on {result['dataset']}, {count(result['images'], 'image')}"
    columns = ("metric", "A", "B", "B − A", "95% interval", "McNemar p", "significant")
    print_table(console, title, columns, rows)


def _columns(names: list[str]) -> dict[str, list[str]]:
    """Put the recalls of one direction into one column, so that a table fits a terminal."""
    columns: dict[str, list[str]] = {}
    for name in names:
        direction, recall, _ = name.partition("_retrieval_recall@")
        at = "/".join(other.rpartition("@")[2] for other in names if other.startswith(direction + recall))
        columns.setdefault(f"{direction} R@{at}" if recall else shorten_metric(name), []).append(name)
    return columns


command = step_command(
    name="eval-zeroshot",
    settings=EvalZeroshotSettings,
    step="clipcid_cli.steps.evaluate.zeroshot",
    summary=show,
    help="Measure models without training: zero-shot classification, and retrieval between images and captions. Metrics, "
    "names and files follow CLIP_benchmark.",
    examples="clipcid eval-zeroshot\n"
    "clipcid eval-zeroshot ViT-B-32 food101/ mscoco/\n"
    "clipcid eval-zeroshot small/student photos/ --classnames names.txt --templates templates.txt\n"
    "clipcid eval-zeroshot ViT-B-32 food101/ --model ViT-L-14 --model small/student --json\n"
    "clipcid eval-zeroshot ViT-B-32 imagenet pets voc2007 --data-root /data/clip_benchmark --predictions\n"
    "clipcid eval-zeroshot --compare A.json B.json",
)
