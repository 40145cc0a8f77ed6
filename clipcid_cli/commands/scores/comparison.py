"""Two results on the same images, side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clipcid_cli.commands.summary import count, format_percent, print_facts, print_table, shorten_metric
from clipcid_cli.formats.data.class_files import describe_lines

if TYPE_CHECKING:
    from rich.console import Console


def show_comparison(result: dict[str, Any], console: Console) -> None:
    """Print the files, whether their class names and templates are the same, and a table of the differences."""
    print_facts(console, "", dict(zip("AB", result["compared"], strict=True)))
    prompts = {
        kind.replace("_", " "): describe_lines(sides["first"]) if sides["same"] else "not the same"
        for kind, sides in (result["prompts"] or {}).items()
    }
    print_facts(console, "", prompts)
    rows = []
    for name, judged in result["differences"].items():
        low, high = judged["interval"]
        rows.append(
            (
                shorten_metric(name),
                format_percent(judged["first"]),
                format_percent(judged["second"]),
                f"{100 * judged['difference']:+.2f}",
                f"{100 * low:+.2f} … {100 * high:+.2f}",
                "–" if judged["p_value"] is None else f"{judged['p_value']:.2g}",
                "yes" if judged["real"] else "no",
            )
        )
    title = f"B against A on {result['dataset']}, {count(result['images'], 'image')}"
    columns = ("metric", "A", "B", "B − A", "95% interval", "McNemar p", "significant")
    print_table(console, title, columns, rows)
