"""`clipcid verify`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from clipcid_cli.commands.command import step_command
from clipcid_cli.commands.summary import format_bytes, print_facts
from clipcid_cli.steps.settings.verify import VerifySettings

if TYPE_CHECKING:
    from clipcid_cli.steps.verify import VerifyResult


def show(result: VerifyResult, console: Console) -> None:
    """Print what was looked at, and how much of it is wrong."""
    facts = {"outputs": f"{result.outputs:,}", "files": f"{result.files:,}, {format_bytes(result.bytes)}"}
    if result.samples is not None:
        facts["samples"] = f"{result.samples:,}"
    if result.unfinished:
        facts["unfinished"] = " ".join(result.unfinished)
    facts["faults"] = f"{len(result.faults):,}, named above" if result.faults else "none"
    print_facts(console, "Not as it was written" if result.faults else "Verified", facts)
    if result.faults:
        console.print("Restore these files, or make their outputs again with --overwrite.", soft_wrap=True)


command = step_command(
    "verify",
    VerifySettings,
    step="clipcid_cli.steps.verify",
    show=show,
    page="""
Compare the files of a work directory, or of one output, with what their sidecar says of them: size, content and rows.
Reports, curves, logs and checkpoints have no record. Nothing is changed. A fault is one line, and the exit code is
then 1; unfinished outputs are named, and are no fault.

\b
Examples:
  clipcid verify
  clipcid verify clipcid-work/embeddings/ViT-B-32 --read-data
  clipcid verify backup/clipcid-work --json
""",
)
