"""`clipcid export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from clipcid_cli.commands.command import step_command
from clipcid_cli.commands.summary import print_facts, print_table
from clipcid_cli.steps.settings.export import ExportSettings

if TYPE_CHECKING:
    from clipcid_cli.steps.export.run import ExportResult


def show(result: ExportResult, console: Console) -> None:
    """Print one line for each form, how close it is to the model it came from, and where the files are."""
    columns = ("form", "image cosine", "text cosine", "same answers", "MB", "images/s")
    rows = [
        (
            form,
            *("" if tower is None else f"{tower.min_cosine:.7f}" for tower in (found.image, found.text)),
            "" if found.same_answers is None else f"{found.same_answers:.1%}",
            f"{found.bytes / 1e6:,.1f}",
            f"{found.images_per_second:,.0f}",
        )
        for form, found in result.parity.items()
    ]
    if rows:
        print_table(console, "Exported", columns, rows)
        console.print()
    facts = {"model": result.model}
    if result.files:
        paths = [Path(path) for path in result.files.values()]
        facts |= {"folder": str(paths[0].parent), "files": ", ".join(path.name for path in paths)}
    print_facts(console, "" if rows else "Would export", facts)


command = step_command(
    "export",
    ExportSettings,
    step="clipcid_cli.steps.export.run",
    show=show,
    page="""
Export a model for other programs. Each format is verified against the original model on images and texts at several
batch sizes; one that differs too much is an error and is not written.

\b
Examples:
  clipcid export
  clipcid export --format open-clip --format hf --format onnx
  clipcid export small/student --format onnx --classnames food101/ \\
      --data food101/ --quantize int8
  clipcid export small/student --format onnx --out onnx/ --data photos/
""",
)
