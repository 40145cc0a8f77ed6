"""The README's help pages and its tables of losses and presets: generated from the code, so they cannot drift.

``python tests/reference.py`` rewrites it; a test fails when it is stale.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from clipcid_cli.algorithms.losses.registry import LOSSES, PRESETS, LossEntry, Weight
from clipcid_cli.cli import COMMANDS, cli

BEGIN = "<!-- The help pages below are generated: python tests/reference.py -->\n"
END = "<!-- end of the generated help pages -->\n"
BEGIN_LOSSES = "<!-- The tables of losses are generated: python tests/reference.py -->\n"
END_LOSSES = "<!-- end of the generated tables of losses -->\n"
_WIDTH = 100


def help_pages() -> dict[str, str]:
    """Return the help page of each subcommand as a terminal of 100 columns shows it."""
    pages = {}
    with click.Context(cli, info_name="clipcid") as group:
        for name in COMMANDS:
            command = cli.get_command(group, name)
            assert command is not None
            with click.Context(command, info_name=name, parent=group, terminal_width=_WIDTH) as ctx:
                pages[name] = command.get_help(ctx)
    return pages


def render_reference() -> str:
    """Return the README's section of help pages, one that opens per subcommand."""
    sections = [
        f"<details>\n<summary><code>clipcid {name}</code>: {COMMANDS[name]}</summary>\n\n"
        f"```text\n{page}\n```\n\n</details>\n"
        for name, page in help_pages().items()
    ]
    return BEGIN + "\n" + "\n".join(sections) + "\n" + END


def render_losses() -> str:
    """Return the README's tables of losses and presets."""
    losses = [f"| `{entry.name}` | {entry.summary} | {_needs(entry)} |" for entry in LOSSES.values()]
    presets = [
        f"| `{name}` | {' + '.join(_term(*item) for item in parts.items())} |" for name, parts in PRESETS.items()
    ]
    return "\n".join(
        [
            BEGIN_LOSSES,
            "| `--loss` | compares | needs |",
            "|---|---|---|",
            *losses,
            "",
            "| `--preset` | is |",
            "|---|---|",
            *presets,
            "",
            END_LOSSES,
        ]
    )


def _needs(entry: LossEntry) -> str:
    return "teacher, clusters" if entry.needs_clusters else "teacher" if entry.needs_teacher else "nothing"


def _term(name: str, weight: Weight) -> str:
    factor = f"{weight.value:g}/D" if weight.per_width else f"{weight.value:g}"
    return f"`{name}`" if factor == "1" else f"{factor} · `{name}`"


def insert_reference(readme: str) -> str:
    """Return the README with its generated sections made anew."""
    for begin, end, section in (
        (BEGIN, END, render_reference()),
        (BEGIN_LOSSES, END_LOSSES, render_losses()),
    ):
        head, _, rest = readme.partition(begin)
        _, _, tail = rest.partition(end)
        readme = head + section + tail
    return readme


def main() -> None:
    """Rewrite the generated sections of the README given on the command line, ``README.md`` by default."""
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "README.md")
    path.write_text(insert_reference(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
