"""The generated parts of the documents: the help pages, and the tables of losses and presets, so they cannot drift.

``python tests/reference.py`` writes them anew; a test fails when one is stale.
"""

from __future__ import annotations

from pathlib import Path

import click

from clipcid_cli.algorithms.losses.registry import CLUSTERS, LOSSES, PRESETS, LossEntry, Weight
from clipcid_cli.cli import COMMANDS, cli

DOCS = Path(__file__).parents[1] / "clipcid_cli" / "docs"
BEGIN = "<!-- Generated from here on: python tests/reference.py -->\n"
END = "<!-- End of the generated part -->\n"
_WIDTH = 100


def help_pages() -> dict[str, str]:
    """Return the help page of each subcommand as a terminal of 100 columns shows it."""
    pages = {}
    with click.Context(cli, info_name="clipcid") as group:
        for name in COMMANDS:
            command = cli.get_command(group, name)
            assert command is not None
            with command.context_class(command, info_name=name, parent=group, terminal_width=_WIDTH) as ctx:
                pages[name] = command.get_help(ctx)
    return pages


def render_help_pages() -> str:
    """Return a section for each subcommand."""
    return "\n".join(f"## clipcid {name}\n\n```text\n{page}\n```\n" for name, page in help_pages().items())


def render_losses() -> str:
    """Return the tables of losses and presets."""
    losses = [f"| `{entry.name}` | {entry.summary} | {_needs(entry)} |" for entry in LOSSES.values()]
    presets = [
        f"| `{name}` | {' + '.join(_term(*item) for item in parts.items())} |" for name, parts in PRESETS.items()
    ]
    return "\n".join(
        [
            "| `--loss` | compares | needs |",
            "|---|---|---|",
            *losses,
            "",
            "| `--preset` | is |",
            "|---|---|",
            *presets,
            "",
        ]
    )


def _needs(entry: LossEntry) -> str:
    return "teacher, clusters" if CLUSTERS in entry.reads else "teacher" if entry.needs_teacher else "nothing"


def _term(name: str, weight: Weight) -> str:
    factor = f"{weight.value:g}/D" if weight.per_width else f"{weight.value:g}"
    return f"`{name}`" if factor == "1" else f"{factor} · `{name}`"


GENERATED = {"cli.md": render_help_pages, "distill.md": render_losses}


def insert_reference(name: str, document: str) -> str:
    """Return a document with its generated part made anew.

    Args:
        name: File name of the document, a key of `GENERATED`.
        document: Its text, with one begin and one end mark.
    """
    head, begin, rest = document.partition(BEGIN)
    _, end, tail = rest.partition(END)
    assert begin, f"{name} has no begin mark"
    assert end, f"{name} has no end mark"
    return f"{head}{BEGIN}\n{GENERATED[name]()}\n{END}{tail}"


def main() -> None:
    """Rewrite the generated parts."""
    for name in GENERATED:
        path = DOCS / name
        path.write_text(insert_reference(name, path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
