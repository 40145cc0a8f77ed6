"""`clipcid distill`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clipcid_cli.commands.command import step_command
from clipcid_cli.commands.console import file_facts, print_facts
from clipcid_cli.steps.settings.distill import DistillSettings

if TYPE_CHECKING:
    from rich.console import Console


def show(result: dict[str, Any], console: Console) -> None:
    """Print what was trained and how well it retrieves."""
    facts = {"steps": f"{result['steps']:,} ({result['samples']:,} samples)"}
    if "samples_per_second" in result:
        facts["speed"] = f"{result['samples_per_second']:,.0f} samples/s"
        facts["losses"] = "  ".join(f"{name} {value:.4f}" for name, value in result["losses"].items())
        facts["held out"] = "  ".join(
            f"{name.replace('_retrieval_recall', ' R')} {value:.3f}" for name, value in result["metrics"].items()
        )
    print_facts(console, "Distilled", facts | file_facts(result))


command = step_command(
    name="distill",
    settings=DistillSettings,
    step="clipcid_cli.steps.distill.run",
    summary=show,
    help="Train a small CLIP, with a teacher's embeddings and clusters or without a teacher. A run that was stopped goes on "
    "where its last checkpoint was: give the same command again.",
    examples="clipcid distill --teacher ViT-L-14 --student ViT-B-32\n"
    "clipcid distill laion/ --teacher none --student student.json --steps 2000 --batch-size 64\n"
    "clipcid distill --student student.json --preset clip-kd --loss crd=0.5 --name kd",
)
