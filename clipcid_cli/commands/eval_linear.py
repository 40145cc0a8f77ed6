"""`clipcid eval-linear`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clipcid_cli.commands.command import step_command
from clipcid_cli.commands.console import file_facts, print_facts
from clipcid_cli.steps.settings.eval_linear import EvalLinearSettings

if TYPE_CHECKING:
    from rich.console import Console


_BARS = "▁▂▃▄▅▆▇█"


def show(result: dict[str, Any], console: Console) -> None:
    """Print the metrics, how the strength was chosen, and the few-shot curve where there is one."""
    facts = {"model": result["model"], "data": result["dataset"]}
    if "metrics" in result:
        facts |= {name: f"{_percent(value)} %" for name, value in result["metrics"].items() if value is not None}
        facts["measured on"] = f"{result['images']:,} images of {result['classes']:,} classes"
        facts["fitted on"] = f"{result['train_images']:,} images"
        chosen, tried = result["c"], result["sweep"]["c"]
        facts["C"] = f"{chosen:.3g}, best of {len(tried)} by {result['metric']} on held-out images"
        facts["held out"] = f"{_percent(result['validation_score'])} % on {result['validation_images']:,} images"
        facts["by C"] = f"{tried[0]:.0e} {_sketch(result['sweep']['score'])} {tried[-1]:.0e}"
    files = {f"{name} file": path for name, path in file_facts(result).items()}
    print_facts(console, "Linear probe" if "metrics" in result else "Would fit a linear probe", facts | files)
    if result.get("shots"):
        _print_shots(result, console)


def _sketch(scores: list[float]) -> str:
    """Draw scores along the grid of C, each as high as its share of the best; every other one, to fit a terminal."""
    low, high = min(scores), max(scores)
    width = (high - low) or 1.0
    return "".join(_BARS[round((len(_BARS) - 1) * (score - low) / width)] for score in scores[::2])


def _print_shots(result: dict[str, Any], console: Console) -> None:
    from rich.table import Table

    curve = result["shots"]
    draws = len(curve[0]["c"])
    title = f"Few-shot, mean ± standard deviation of {draws} draws" if draws > 1 else "Few-shot, one draw"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    table.add_column("images a class", justify="right", style="cyan")
    table.add_column("images", justify="right")
    names = [name for name, value in curve[0]["metrics"].items() if value["mean"] is not None]
    for name in names:
        table.add_column(_short(name), justify="right", no_wrap=True)
    table.add_column("C", justify="right", no_wrap=True)
    for point in curve:
        values = [_with_spread(point["metrics"][name]) for name in names]
        table.add_row(str(point["shots"]), f"{point['images']:,}", *values, _range(point["c"]))
    whole = [_percent(result["metrics"][name]) for name in names]
    table.add_row("all", f"{result['train_images']:,}", *whole, f"{result['c']:.2g}", style="bold")
    console.print()
    console.print(table)


def _short(name: str) -> str:
    short = name.removeprefix("lp_").replace("mean_per_class_recall", "per class")
    return short.replace("mean_average_precision", "mAP").replace("_11_point", " 11-point")


def _with_spread(value: dict[str, Any]) -> str:
    return _percent(value["mean"]) + ("" if value["std"] is None else f" ± {100 * value['std']:.1f}")


def _range(values: list[float]) -> str:
    low, high = f"{min(values):.2g}", f"{max(values):.2g}"
    return low if low == high else f"{low} … {high}"


def _percent(value: float) -> str:
    return f"{100 * value:.2f}"


command = step_command(
    name="eval-linear",
    settings=EvalLinearSettings,
    step="clipcid_cli.steps.evaluate.linear",
    summary=show,
    help="Measure how well a linear classifier on a model's frozen image features does. Logistic regression, solved to a "
    "stated gradient norm, its regularisation chosen among 45 values on a part of the training images (DINOv2's protocol).",
    examples="clipcid eval-linear --train food101/train --test food101/test\n"
    "clipcid eval-linear ViT-B-32 food101/\n"
    "clipcid eval-linear ViT-B-32 food101/ --shots 1,2,4,8,16\n"
    "clipcid eval-linear small/student photos/ --val-fraction 0.1 --json",
)
