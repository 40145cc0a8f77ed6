"""`clipcid export`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from clipcid_cli.commands.command import step_command
from clipcid_cli.commands.summary import print_facts, print_table, shorten_metric, wrap
from clipcid_cli.steps.settings.export import ExportSettings

if TYPE_CHECKING:
    from clipcid_cli.steps.export.run import ExportResult


def show(result: ExportResult, console: Console) -> None:
    """Print one line for each form, how close it is to the model it came from, and where the files are."""
    answers = next((parity.zeroshot for parity in result.parity.values() if parity.zeroshot is not None), None)
    accuracy = "accuracy" if answers is None else shorten_metric(answers.measure)
    columns = ("form", "cosine", f"{accuracy} %", "same", "MB", "images/s", "ms p50 / p95")
    rows = [
        (
            form,
            "" if parity.min_cosine is None else f"{parity.min_cosine:.7f}",
            "" if parity.zeroshot is None else str(parity.zeroshot),
            "" if parity.same_answers is None else f"{parity.same_answers:.1%}",
            f"{parity.bytes / 1e6:,.1f}",
            "" if parity.images_per_second is None else f"{parity.images_per_second:,.0f}",
            "" if parity.latency_ms is None else str(parity.latency_ms),
        )
        for form, parity in result.parity.items()
    ]
    if rows:
        print_table(console, "Exported", columns, rows)
        note = "cosine: the smallest to the original; same: images with the same prediction"
        if "web/search" in result.files:
            note += ", or texts with the same nearest image"
        note += "; ms: for single images"
        if answers is not None:
            note += f"; {accuracy}: original → export"
        console.print(Text(wrap(note, console.width), style="dim"), soft_wrap=True)
        console.print()
    facts = {"model": result.model}
    if result.files:
        folder = Path(result.files["README"]).parent
        places = [Path(path).relative_to(folder).parts for path in result.files.values()]
        names = dict.fromkeys(first if not others else f"{first}/" for first, *others in places)
        facts |= {"folder": str(folder), "files": ", ".join(names)}
        if page := result.files.get("web/index"):
            facts["page"] = shlex.join(["python", "-m", "http.server", "--directory", str(Path(page).parent)])
        if page := result.files.get("web/search"):
            facts["search"] = f"http://localhost:8000/{Path(page).name}"
    if result.pushed:
        facts["pushed"] = result.pushed
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
