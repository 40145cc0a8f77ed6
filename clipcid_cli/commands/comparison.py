"""What `--compare` of both evaluations prints: the files, a table of the differences, and what a margin makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from clipcid_cli.commands.summary import count, format_percent, print_facts, print_table, shorten_metric, wrap

if TYPE_CHECKING:
    from clipcid_cli.records import Draws
    from clipcid_cli.steps.evaluate.comparison import Comparison, ComparisonResult, Difference


def show_comparison(answer: Comparison, console: Console) -> None:
    """Print a table of the differences on each data set, and of those of the mean over them."""
    from clipcid_cli.steps.evaluate.comparison import ComparisonResult

    if isinstance(answer, ComparisonResult):
        _show_dataset(answer, console)
        return
    for result in answer.results:
        _show_dataset(result, console)
        console.print()
    for mean in answer.means:
        title = f"B against A on the mean over {', '.join(mean.counted)}"
        counted = ", ".join(dict.fromkeys(map(shorten_metric, mean.counted.values())))
        _show_differences(title, {f"mean {counted}": mean}, answer.margin, console)


def _show_dataset(answer: ComparisonResult, console: Console) -> None:
    """Print the files, whether their class names and templates are the same, and a table of the differences."""
    files = dict[str, str]()
    for side, compared in zip("AB", answer.compared, strict=True):
        if isinstance(compared, str):
            files[side] = compared
        else:
            files |= {f"{side}{seed}": file for seed, file in enumerate(compared, start=1)}
    print_facts(console, "", files)
    prompts = {
        kind.replace("_", " "): str(sides.first) if sides.same else "not the same"
        for kind, sides in (answer.prompts or {}).items()
    }
    print_facts(console, "", prompts)
    on = f"on {answer.dataset}, {count(answer.images, 'image')}"
    if answer.groups is not None:
        on += f" in {count(answer.groups, 'group')}"
    if len(files) > 2:
        _show_seeds(answer, list(files), f"Each seed {on}", console)
        on += f", {len(files) // 2} seeds each (mean ± std)"
    _show_differences(f"B against A {on}", answer.differences, answer.margin, console)


def _show_differences(
    title: str, differences: Mapping[str, Difference], margin: float | None, console: Console
) -> None:
    """Print a table of differences, what their intervals are of, and what a margin makes of them."""
    rows = []
    is_pair = all(isinstance(judged.first, float) for judged in differences.values())
    has_test = any(judged.p_value is not None for judged in differences.values())
    for name, judged in differences.items():
        row = [
            shorten_metric(name),
            _format_side(judged.first),
            _format_side(judged.second),
            f"{100 * judged.difference:+.2f}",
            " … ".join(f"{100 * bound:+.2f}" for bound in judged.interval),
        ]
        if has_test:
            row.append("–" if judged.p_value is None else f"{judged.p_value:.2g}")
        rows.append([*row, "yes" if judged.real else "no" if judged.enough_seeds else "too few seeds"])
    columns = ["metric", "A", "B", "B − A", "95% interval", *["McNemar p"] * has_test, "significant"]
    print_table(console, title, columns, rows)
    if not is_pair:
        note = "The intervals are over images and, by Student's t, over seeds."
        console.print(Text(wrap(note, console.width), style="dim"), soft_wrap=True)
    if margin is not None:
        _show_margin(differences, margin, console)


def _show_margin(differences: Mapping[str, Difference], margin: float, console: Console) -> None:
    """Print what the intervals say of a margin."""
    rows = [[shorten_metric(name), _by_margin(judged, margin)] for name, judged in differences.items()]
    console.print()
    print_table(console, f"With a margin of {margin:g} point{'' if margin == 1 else 's'}", ["metric", "verdict"], rows)


def _by_margin(judged: Difference, margin: float) -> str:
    if judged.no_worse is None:
        return "too few seeds"
    if judged.equivalent:
        return "equivalent"
    if judged.no_worse:
        return "B no worse"
    return "A no worse" if 100 * judged.interval[1] < margin else "not shown"


def _format_side(side: float | Draws) -> str:
    if isinstance(side, float):
        return format_percent(side)
    return f"{format_percent(side.mean)} ± {format_percent(side.std)}"


def _show_seeds(answer: ComparisonResult, seeds: list[str], title: str, console: Console) -> None:
    """Print a table of the values behind means, with a blank line after it."""
    rows = []
    for name, judged in answer.differences.items():
        row = [shorten_metric(name)]
        for side in (judged.first, judged.second):
            if not isinstance(side, float):
                row += [format_percent(value) for value in side.values]
        rows.append(row)
    print_table(console, title, ["metric", *seeds], rows)
    console.print()
