"""`clipcid eval-linear`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clipcid_cli.commands.command import step_command
from clipcid_cli.commands.console import file_facts, print_facts
from clipcid_cli.steps.settings.eval_linear import EvalLinearSettings

if TYPE_CHECKING:
    from rich.console import Console


def show(result: dict[str, Any], console: Console) -> None:
    """Print the accuracy and how the probe was fitted."""
    facts = {"model": result["model"], "data": result["dataset"]}
    if "metrics" in result:
        values = result["metrics"]
        facts |= {name: "–" if value is None else f"{100 * value:.2f} %" for name, value in values.items()}
        facts["fitted on"] = f"{result['train_images']:,} images, C = {result['c']:.3g}"
        facts["measured on"] = f"{result['images']:,} images of {result['classes']:,} classes"
    files = {f"{name} file": path for name, path in file_facts(result).items()}
    print_facts(console, "Linear probe" if "metrics" in result else "Would fit a linear probe", facts | files)


command = step_command(
    name="eval-linear",
    settings=EvalLinearSettings,
    step="clipcid_cli.steps.eval_linear",
    summary=show,
    help="Measure how well a linear classifier on a model's frozen image features does. Logistic regression, solved to a "
    "stated gradient norm, its regularisation chosen among 45 values on a part of the training images (DINOv2's protocol).",
    examples="clipcid eval-linear --train food101/train --test food101/test\n"
    "clipcid eval-linear ViT-B-32 food101/\n"
    "clipcid eval-linear small/student photos/ --val-fraction 0.1 --json",
)
