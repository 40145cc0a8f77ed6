"""`clipcid eval-linear`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from clipcid_cli.commands.command import step_command
from clipcid_cli.commands.comparison import show_comparison
from clipcid_cli.commands.eval_zeroshot import describe_majority
from clipcid_cli.commands.summary import count, format_percent, print_facts, print_table, shorten_metric
from clipcid_cli.steps.settings.eval_linear import EvalLinearSettings

if TYPE_CHECKING:
    from clipcid_cli.records import Draws
    from clipcid_cli.steps.evaluate.comparison import Comparison
    from clipcid_cli.steps.evaluate.probe_result import LinearResult
    from clipcid_cli.steps.evaluate.result import Preview

_BARS = "▁▂▃▄▅▆▇█"
_PER_BAR = 2  # values of C, to fit a terminal
_DIGITS = 2


def show(answer: LinearResult | Preview | Comparison, console: Console) -> None:
    """Print the metrics, how the strength was chosen, and the few-shot curve; of a comparison its verdicts."""
    from clipcid_cli.steps.evaluate.probe_result import LinearResult
    from clipcid_cli.steps.evaluate.result import Preview

    if not isinstance(answer, LinearResult | Preview):
        show_comparison(answer, console)
        return
    facts = {"model": answer.model, "data": answer.dataset}
    files = {f"{name} file": path for name, path in answer.files.items()}
    if isinstance(answer, Preview):
        title = "Would reuse a linear probe" if answer.reused else "Would fit a linear probe"
        print_facts(console, title, facts, files)
        return
    for name, value in answer.metrics.items():
        if value is not None:
            facts[name] = f"{format_percent(value, _DIGITS)}%" + _describe_interval(answer.intervals.get(name))
    if answer.chance:
        guessed = ", ".join(
            f"{shorten_metric(name)} {format_percent(value)}%"
            for name, value in answer.chance.items()
            if name.startswith("lp_")
        )
        facts["chance"] = guessed + describe_majority(answer.majority, "%")
    facts["measured on"] = f"{count(answer.images, 'image')} of {count(answer.classes, 'class', 'classes')}"
    if answer.groups is not None:
        facts["measured on"] += f", in {count(answer.groups, 'group')} that the intervals draw whole"
    if answer.repeated_images:
        facts["measured on"] += f"; {answer.repeated_images:,} are among those of training too"
    facts["fitted on"] = count(answer.train_images, "image")
    tried = answer.sweep.c
    chosen_on = "on held-out images" if answer.folds == 1 else f"in {answer.folds} folds"
    facts["C"] = f"{answer.c:.3g}, best of {len(tried)} by {answer.metric} {chosen_on}{_describe_ties(answer)}"
    facts["held out"] = (
        f"{format_percent(answer.validation_score, _DIGITS)}% on {count(answer.validation_images, 'image')}"
        + ("" if answer.folds == 1 else ", each by the fit of the other folds")
    )
    facts["by C"] = f"{tried[0]:.0e} {_sketch(answer.sweep.score)} {tried[-1]:.0e}, best of {_PER_BAR} per bar"
    print_facts(console, "Linear probe", facts, files)
    if answer.shots:
        console.print()
        _print_shots(answer, console)


def _describe_interval(bounds: tuple[float, float] | None) -> str:
    if bounds is None:
        return ""
    low, high = (format_percent(bound, _DIGITS) for bound in bounds)
    return f" (95% interval {low} … {high})"


def _describe_ties(answer: LinearResult) -> str:
    """Say how many weaker regularisations scored as well as the chosen one."""
    ties = answer.sweep.score.count(answer.validation_score) - 1
    return f"; {ties} larger {'one is' if ties == 1 else 'ones are'} as good" if ties > 0 else ""


def _sketch(scores: list[float]) -> str:
    """Draw scores along the grid of C, each as high as its part of the best; of several per bar the best."""
    low, high = min(scores), max(scores)
    width = (high - low) or 1.0
    shown = [max(scores[first : first + _PER_BAR]) for first in range(0, len(scores), _PER_BAR)]
    return "".join(_BARS[round((len(_BARS) - 1) * ((score - low) / width))] for score in shown)


def _print_shots(answer: LinearResult, console: Console) -> None:
    curve = answer.shots
    draws = len(curve[0].c)
    title = f"Few-shot, mean ± standard deviation of {draws} draws" if draws > 1 else "Few-shot, one draw"
    names = [name for name, value in curve[0].metrics.items() if value.mean is not None]
    rows = [
        [str(one.shots), f"{one.images:,}", *(_with_spread(one.metrics[name]) for name in names), _range(one.c)]
        for one in curve
    ]
    whole = [format_percent(answer.metrics[name], _DIGITS) for name in names]
    rows.append(["all", f"{answer.train_images:,}", *whole, f"{answer.c:.2g}"])
    print_table(console, title, ["shots", "images", *map(shorten_metric, names), "C"], rows, left=0)


def _with_spread(value: Draws) -> str:
    return format_percent(value.mean, _DIGITS) + ("" if value.std is None else f" ± {100 * value.std:.1f}")


def _range(values: list[float]) -> str:
    low, high = f"{min(values):.2g}", f"{max(values):.2g}"
    return low if low == high else f"{low} … {high}"


command = step_command(
    "eval-linear",
    EvalLinearSettings,
    step="clipcid_cli.steps.evaluate.linear",
    show=show,
    page="""
Measure a linear probe: logistic regression on the frozen image features of a model. The regularization is chosen
among 45 values on a part of the training images, as in DINOv2's protocol.

\b
Examples:
  clipcid eval-linear --train food101/train --test food101/test
  clipcid eval-linear ViT-B-32 food101/
  clipcid eval-linear ViT-B-32 food101/ --shots 1,2,4,8,16 --knn 10,20
  clipcid eval-linear small/student photos/ --val-fraction 0.1 --json
  clipcid eval-linear --compare A.json B.json
""",
)
