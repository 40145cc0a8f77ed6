"""What `eval-zeroshot --suite` prints: a line for each data set, the means of the suite, and what is missing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from clipcid_cli.commands.summary import format_percent, print_facts, print_table, shorten_metric, wrap

if TYPE_CHECKING:
    from clipcid_cli.steps.evaluate.suite_result import SuiteResult


def show_suite(answer: SuiteResult, console: Console) -> None:
    """Print the scores that the suite counts; a mean of some data sets is never called the suite's average."""
    models = [one.model for one in answer.models]
    columns = ["data", "metric", *(["score"] if len(models) == 1 else models)]
    rows = [
        [title, shorten_metric(metric), *(format_percent(one.scores[title]) for one in answer.models)]
        for title, metric in answer.counted.items()
    ]
    of = f" of {models[0]}" if len(models) == 1 else ""
    print_table(console, f"Suite {answer.suite}{of}", columns, rows, left=2)
    console.print()
    means = {
        name: [_with_half(one.groups[name], one.group_intervals.get(name)) for one in answer.models]
        for name in answer.models[0].groups
    }
    scored = answer.measured - len(answer.without_metric)
    lacking = {"missing": answer.missing, "without the metric that counts": answer.without_metric}
    is_whole = scored == answer.datasets
    every = f"average of all {answer.datasets}" if is_whole else f"mean of these {scored}"
    means[every] = [_with_half(one.mean_of_measured, one.mean_interval) for one in answer.models]
    shown = [[name, *values] for name, values in means.items()]
    title = "Means, ± half the 95% interval over the images" if answer.models[0].intervals else "Means"
    print_table(console, title, ["", *(["score"] if len(models) == 1 else models)], shown)
    if not is_whole:
        named = "; ".join(f"{what}: {', '.join(titles)}" for what, titles in lacking.items() if titles)
        note = (
            f"{scored} of {answer.datasets}; {named}. Without them there is no average, and the mean of these {scored} "
            "cannot be compared with one."
        )
        console.print(Text(wrap(note, console.width), style="yellow"), soft_wrap=True)
    console.print()
    print_facts(console, "", {}, answer.files)


def _with_half(value: float | None, bounds: tuple[float, float] | None) -> str:
    half = "" if bounds is None else f" ±{50 * (bounds[1] - bounds[0]):.1f}"
    return format_percent(value) + half
