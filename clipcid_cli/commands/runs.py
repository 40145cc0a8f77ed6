"""`clipcid runs`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from clipcid_cli.commands.command import step_command
from clipcid_cli.commands.summary import format_percent, print_facts, print_table, shorten_metric
from clipcid_cli.steps.settings.runs import RunsSettings

if TYPE_CHECKING:
    from clipcid_cli.records import Draws
    from clipcid_cli.steps.runs import Contents, EvaluationRow, RunRow

_SHOWN = (
    "image_retrieval_recall@1",
    "image_retrieval_recall@5",
    "text_retrieval_recall@1",
    "teacher_retrieval_recall@1",
)


def show(contents: Contents, console: Console) -> None:
    """Print what the work directory holds, a line for each group of runs and each evaluation, and where the page is."""
    print_facts(console, contents.work, {output.name: output.about for output in contents.made})
    if contents.runs:
        console.print()
        _print_runs(contents.runs, console)
    if contents.evaluations:
        console.print()
        rows = [_evaluation(row) for row in contents.evaluations]
        columns = ["data", "model", "metric", "%", "chance", "majority"]
        title = "Evaluations by the usual metric (±: half the 95% interval; of seeds the std)"
        print_table(console, title, columns, rows, left=3)
    if not (contents.made or contents.runs or contents.evaluations):
        print_facts(console, "", {"holds": "nothing yet"})
    if contents.files:
        console.print()
        print_facts(console, "", {"page": contents.files["index"]})


def _print_runs(runs: list[RunRow], console: Console) -> None:
    names = [name for name in _SHOWN if any(name in row.metrics for row in runs)]
    rows = [
        [
            row.name if row.finished else f"{row.name} (unfinished)",
            ", ".join(map(str, row.seeds)) or "–",
            f"{row.steps:,}" + ("" if row.planned is None else f" of {row.planned:,}"),
            _count(row.held_out),
            *(_spread(row.metrics.get(name)) for name in names),
        ]
        for row in runs
    ]
    # By the number of held-out images, which says whose it is.
    chances = dict.fromkeys(
        (_count(row.held_out), *(format_percent(row.chance.get(name)) for name in names)) for row in runs if row.chance
    )
    rows += [["chance", "", "", *cells] for cells in chances]
    title = "Runs, held-out retrieval in % (several seeds: mean ± standard deviation)"
    print_table(console, title, ["run", "seed", "steps", "held out", *map(shorten_metric, names)], rows)


def _count(images: int | None) -> str:
    return "–" if images is None else f"{images:,}"


def _evaluation(row: EvaluationRow) -> list[str]:
    name = row.customary if row.customary in row.metrics else next(iter(row.metrics), None)
    if name is None:
        return [row.dataset, row.model, "–", "–", "–", "–"]
    value = _spread(row.metrics[name])
    if name in row.intervals:
        low, high = row.intervals[name]
        value += f" ±{50 * (high - low):.1f}"
    is_accuracy = name.endswith("acc1")
    majority = format_percent(row.majority) if is_accuracy and row.majority is not None else ""
    shown = f"{'probe ' * name.startswith('lp_')}{shorten_metric(name)}"
    variant = [part.removeprefix("classnames-").removeprefix("templates-") for part in row.variant.split("_") if part]
    data = ", ".join([row.dataset, *variant])
    return [data, row.model, shown, value, format_percent(row.chance.get(name)), majority]


def _spread(value: Draws | None) -> str:
    if value is None:
        return "–"
    return format_percent(value.mean) + ("" if value.std is None else f" ± {format_percent(value.std)}")


command = step_command(
    "runs",
    RunsSettings,
    step="clipcid_cli.steps.runs",
    show=show,
    page="""
List what a work directory holds: embeddings, balance, clusters, exports, and all training runs and evaluations. Writes
index.html there: tables to sort, learning curves of all runs in one figure, links to the reports. Runs that differ in
their seed alone are one line, with mean and standard deviation.

\b
Examples:
  clipcid runs
  clipcid runs --work other-work --json
""",
)
