"""`clipcid export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipcid_cli.commands.command import step_command
from clipcid_cli.commands.summary import print_facts, print_table
from clipcid_cli.steps.settings.export import ExportSettings

if TYPE_CHECKING:
    from rich.console import Console


def show(result: dict[str, Any], console: Console) -> None:
    """Print one line for each form, how close it is to the model it came from, and where the files are."""
    columns = ("form", "image cosine", "text cosine", "same answers", "MB", "images/s")
    rows = []
    for form, values in result["parity"].items():
        zeroshot = values["zeroshot"]
        agreement = zeroshot["agreement"] if zeroshot is not None else values.get("agreement")
        rows.append(
            (
                form,
                *(f"{values[tower]['min_cosine']:.7f}" if tower in values else "" for tower in ("image", "text")),
                "" if agreement is None else f"{agreement:.1%}",
                f"{values['bytes'] / 1e6:,.1f}",
                f"{values['images_per_second']:,.0f}",
            )
        )
    if rows:
        print_table(console, "Exported", columns, rows)
        console.print()
    facts = {"model": result["model"]}
    if result["files"]:
        folder = Path(next(iter(result["files"].values()))).parent
        facts |= {"folder": str(folder), "files": ", ".join(Path(path).name for path in result["files"].values())}
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
