"""`clipcid eval-zeroshot`, and the tables of scores that `distill` prints too: one for each task and set of metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from clipcid_cli.commands.command import step_command
from clipcid_cli.commands.comparison import show_comparison
from clipcid_cli.commands.summary import format_percent, print_facts, print_table, shorten_metric, wrap
from clipcid_cli.steps.settings.eval_zeroshot import EvalZeroshotSettings

if TYPE_CHECKING:
    from clipcid_cli.steps.evaluate.comparison import Comparison
    from clipcid_cli.steps.evaluate.result import ZeroshotResult, ZeroshotResults
    from clipcid_cli.steps.evaluate.suite_result import SuiteResult
    from clipcid_cli.steps.evaluate.zeroshot import Answer


def show(answer: Answer, console: Console) -> None:
    """Print one line for each model on each data set, and where the files are; of a comparison its verdicts."""
    from clipcid_cli.steps.evaluate.result import Preview, Previews, ZeroshotResult, ZeroshotResults

    if not isinstance(answer, ZeroshotResult | ZeroshotResults | Preview | Previews):
        _show_other(answer, console)
        return
    results = answer.results if isinstance(answer, ZeroshotResults | Previews) else [answer]
    show_tables([one for one in results if not isinstance(one, Preview)], console)
    if isinstance(answer, ZeroshotResults):
        _show_means(answer, console)
    kinds = ("metrics", "predictions", "skipped")
    files = {kind: "\n".join(one.files[kind] for one in results if kind in one.files) for kind in kinds}
    if not isinstance(answer, Previews):
        files |= {name: path for name, path in answer.files.items() if name not in kinds}
    print_facts(console, "", {}, {name: paths for name, paths in files.items() if paths})


def _show_other(answer: Comparison | SuiteResult, console: Console) -> None:
    from clipcid_cli.steps.evaluate.suite_result import SuiteResult

    if isinstance(answer, SuiteResult):
        from clipcid_cli.commands.suite import show_suite

        show_suite(answer, console)
    else:
        show_comparison(answer, console)


def _show_means(answer: ZeroshotResults, console: Console) -> None:
    """Print a table for each task with several data sets: what each model scores on their mean."""
    shown = {(one.model, one.pretrained): one.shown_model for one in answer.results}
    for task in dict.fromkeys(mean.task for mean in answer.means):
        means = [mean for mean in answer.means if mean.task == task]
        title = f"Mean over {', '.join(means[0].counted)} of the metric with *"
        rows = [
            [
                shown[mean.model, mean.pretrained],
                format_percent(mean.value),
                "–" if mean.interval is None else " … ".join(map(format_percent, mean.interval)),
            ]
            for mean in means
        ]
        print_table(console, title, ["model", "mean", "95% interval"], rows)
        console.print()


def show_tables(results: list[ZeroshotResult], console: Console) -> None:
    """Print a line for each model on each data set, in a table for each task, with a blank line after each table."""
    # Tables of one task may differ in their metrics: data with several classes an image has its own.
    tables: dict[tuple[str, tuple[str, ...]], list[ZeroshotResult]] = {}
    for one in results:
        tables.setdefault((one.task, tuple(one.metrics)), []).append(one)
    for rows in tables.values():
        _show_table(rows, console)
        console.print()


def _show_table(rows: list[ZeroshotResult], console: Console) -> None:
    metrics = group_metrics(list(rows[0].metrics))
    title = rows[0].task.replace("_", " ").replace("zeroshot", "zero-shot").capitalize()
    columns: dict[str, list[str]] = {}
    models = [one.shown_model for one in rows]
    for name, word, values in (("model", "of", models), ("data", "on", [one.dataset for one in rows])):
        if len(set(values)) == 1:
            title += f" {word} {values[0]}"
        else:
            columns[name] = values
    left = len(columns)
    columns |= {column: [_cell(one, names) for one in rows] for column, names in metrics.items()}
    columns["images"] = [f"{one.images:,}" for one in rows]
    columns["images/s"] = [f"{one.images_per_second:,.0f}" for one in rows]
    print_table(console, title, list(columns), list(zip(*columns.values(), strict=True)), left=left)
    note = "* the metric usually reported for this data"
    if any(len(names) == 1 and names[0] in one.intervals for names in metrics.values() for one in rows):
        note += "; ± half the 95% bootstrap interval"
        note += ", of groups of images" if rows[0].groups is not None else ""
    notes = [note, *_describe_chance(rows), *_describe_prompts(rows)]
    console.print(Text(wrap("\n".join(notes), console.width), style="dim"), soft_wrap=True)


def _describe_chance(rows: list[ZeroshotResult]) -> list[str]:
    """Write what a guess scores on each data set, and what predicting its largest class does."""
    several = len({one.dataset for one in rows}) > 1
    lines = []
    for one in rows:
        guessed = ", ".join(
            f"{column} {' / '.join(format_percent(one.chance.get(name)) for name in names)}"
            for column, names in group_metrics(list(one.chance)).items()
        )
        if guessed:
            lines.append(f"{one.dataset + ', ' if several else ''}chance: {guessed}" + describe_majority(one.majority))
    return list(dict.fromkeys(lines))


def describe_majority(share: float | None, unit: str = "") -> str:
    """Write what predicting the largest class scores; nothing where images have no class of their own."""
    return "" if share is None else f"; always the largest class: acc1 {format_percent(share)}{unit}"


def _describe_prompts(rows: list[ZeroshotResult]) -> list[str]:
    """Write the class names and templates of each data set, by which a score can be compared with others."""
    several = len({one.dataset for one in rows}) > 1
    return list(
        dict.fromkeys(
            f"{one.dataset + ', ' if several else ''}{kind.replace('_', ' ')}: {lines}"
            for one in rows
            for kind, lines in (one.prompts or {}).items()
        )
    )


def _cell(one: ZeroshotResult, names: list[str]) -> str:
    """Write the values of one column, the customary one with a star; a single one with half its interval."""
    if len(names) > 1:
        return " / ".join(format_percent(one.metrics[name]) + "*" * (name == one.customary) for name in names)
    (name,) = names
    text = format_percent(one.metrics[name])
    if one.metrics[name] is None:
        return text
    bounds = one.intervals.get(name)
    half = f" ±{50 * (bounds[1] - bounds[0]):.1f}" if bounds is not None else ""
    return f"{text}{half}{'*' if name == one.customary else ' '}"


def group_metrics(names: list[str]) -> dict[str, list[str]]:
    """Put metrics whose titles differ after an @ alone into one column, so that a table fits a terminal."""
    columns: dict[str, list[str]] = {}
    for name in names:
        columns.setdefault(shorten_metric(name).partition("@")[0], []).append(name)
    return {_head(column_names): column_names for column_names in columns.values()}


def _head(names: list[str]) -> str:
    """Return the heading of a column of metrics: ``image R@1/5/10``."""
    first, *others = map(shorten_metric, names)
    return "/".join([first, *(title.partition("@")[2] for title in others)])


command = step_command(
    "eval-zeroshot",
    EvalZeroshotSettings,
    step="clipcid_cli.steps.evaluate.zeroshot",
    show=show,
    page="""
Measure models without training: zero-shot classification, and retrieval between images and captions. Metrics, names
and files follow CLIP_benchmark.

\b
Examples:
  clipcid eval-zeroshot
  clipcid eval-zeroshot ViT-B-32 food101/ mscoco/
  clipcid eval-zeroshot small/student photos/ --classnames names.txt \\
      --templates templates.txt
  clipcid eval-zeroshot ViT-B-32 food101/ --model ViT-L-14 --json
  clipcid eval-zeroshot ViT-B-32 imagenet pets voc2007 \\
      --data-root /data/clip_benchmark --predictions
  clipcid eval-zeroshot ViT-B-32 --suite datacomp /data/datacomp
  clipcid eval-zeroshot --compare A.json B.json
  clipcid eval-zeroshot --compare 'pets_A-*_classification.json' \\
      'pets_B-*_classification.json'
""",
)
