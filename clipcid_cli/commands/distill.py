"""`clipcid distill`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from clipcid_cli.commands.command import step_command
from clipcid_cli.commands.summary import count, format_host_memory, format_percent, format_seconds, print_facts
from clipcid_cli.steps.settings.distill import DistillSettings

if TYPE_CHECKING:
    from clipcid_cli.steps.distill.result import DistillCost, Distilled
    from clipcid_cli.steps.embed.result import EmbedCost


def show(result: Distilled | DistillCost | EmbedCost, console: Console) -> None:
    """Print what was trained and how well it retrieves; of a dry run, what it would cost."""
    from clipcid_cli.steps.distill.result import DistillCost
    from clipcid_cli.steps.embed.result import EmbedCost

    if isinstance(result, EmbedCost):
        from clipcid_cli.commands.embed import show as show_embedded

        show_embedded(result, console)
        return
    facts = {"steps": f"{result.steps:,} ({count(result.samples, 'sample')})"}
    if isinstance(result, DistillCost):
        facts["student"] = f"{result.student}, {result.parameters / 1e6:.1f} M parameters"
        facts["speed"] = f"about {result.samples_per_second:,.0f} samples/s"
        if result.bound_by == "data":
            facts["speed"] += ", bound by decoding"
        facts["time"] = f"about {format_seconds(result.seconds['train'])}"
        facts["memory"] = f"{result.memory_bytes / 2**30:.1f} GiB in each process"
        facts["host memory"] = format_host_memory(result.host_memory_bytes, result.shared_memory_bytes)
        print_facts(console, "Would train", facts)
        return
    facts["speed"] = f"{result.samples_per_second:,.0f} samples/s"
    facts["losses"] = ", ".join(f"{name} {value:.4f}" for name, value in result.losses.items())
    shown = {one.dataset for one in result.evaluations}
    for name, metrics in _by_data(result.metrics).items():
        if name.removesuffix(", EMA") not in shown:
            facts[name] = _format_metrics(metrics, result.chance if name.startswith("held out") else {})
    print_facts(console, "Distilled", facts, result.files)
    if result.evaluations:
        from clipcid_cli.commands.eval_zeroshot import show_tables

        console.print()
        show_tables(result.evaluations, console)
        print_facts(console, "", {"metrics": "\n".join(one.files["metrics"] for one in result.evaluations)})


def _by_data(metrics: dict[str, float]) -> dict[str, dict[str, float]]:
    """Divide metrics by what they were measured on: the held-out part and named data sets."""
    by_data: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        data, _, metric = name.removeprefix("ema/").rpartition("/")
        title = data or "held out"
        if name.startswith("ema/"):
            title += ", EMA"
        by_data.setdefault(title, {})[metric] = value
    return by_data


def _format_metrics(metrics: dict[str, float], chance: dict[str, float]) -> str:
    """Write metrics in percent, those of retrieval on a line for each direction: ``image R@1/5/10 7.4 / 29.6 / 44.4%``."""
    from clipcid_cli.commands.eval_zeroshot import group_metrics

    lines = []
    for column, names in group_metrics(list(metrics)).items():
        line = f"{column} {' / '.join(format_percent(metrics[name]) for name in names)}%"
        if all(name in chance for name in names):
            line += f" (chance {' / '.join(format_percent(chance[name]) for name in names)})"
        lines.append(line)
    return "\n".join(lines)


command = step_command(
    "distill",
    DistillSettings,
    step="clipcid_cli.steps.distill.run",
    show=show,
    page="""
Train a small CLIP on a teacher's embeddings, or without a teacher. To continue a run that was stopped, run the same
command again: it resumes from the last checkpoint.

\b
Examples:
  clipcid distill --teacher ViT-L-14 --student ViT-B-32
  clipcid distill laion/ --teacher none --student student.json \\
      --steps 2000 --batch-size 64
  clipcid distill --student student.json --loss fd=10 --name cid
""",
)
