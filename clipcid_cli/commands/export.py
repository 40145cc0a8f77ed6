"""`clipcid export`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clipcid_cli.commands.command import step_command
from clipcid_cli.steps.settings.export import ExportSettings

if TYPE_CHECKING:
    from rich.console import Console


def show(result: dict[str, Any], console: Console) -> None:
    """Print what was written and how close it is to the model it came from."""
    from clipcid_cli.commands.console import file_facts, print_facts

    facts = {"model": result["model"]}
    for form, towers in result["parity"].items():
        facts[f"{form} parity"] = "; ".join(
            f"{tower} within {values['max_difference']:.1e}, cosine ≥ {values['min_cosine']:.7f}"
            for tower, values in towers.items()
        )
    print_facts(console, "Exported", facts | file_facts(result))


command = step_command(
    name="export",
    settings=ExportSettings,
    step="clipcid_cli.steps.export",
    summary=show,
    help="Write a trained model for other programs. Each form is checked against the model it came from, on images and "
    "texts at several batch sizes; one that differs too much is an error and is not written.",
    examples="clipcid export\n"
    "clipcid export --format open-clip --format onnx\n"
    "clipcid export runs/small/student --format onnx --out small-onnx --data photos/",
)
