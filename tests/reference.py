"""The command line reference in the README: generated from the help pages, so it cannot drift.

``python tests/reference.py`` rewrites it; a test fails when it is stale.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from clipcid_cli.cli import COMMANDS, cli

BEGIN = "<!-- The help pages below are generated: python tests/reference.py -->\n"
END = "<!-- end of the generated help pages -->\n"
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


def insert_reference(readme: str) -> str:
    """Return the README with its generated section made anew."""
    head, _, rest = readme.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return head + render_reference() + tail


def main() -> None:
    """Rewrite the generated section of the README given on the command line, ``README.md`` by default."""
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "README.md")
    path.write_text(insert_reference(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
