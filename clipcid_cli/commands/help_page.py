"""Help pages: examples first, then arguments and options under headings, and no name broken over two lines."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import click

from clipcid_cli.commands.wrapping import wrap_command

# click breaks lines at hyphens and spaces; these two stand in for those that must not be broken at until the page is done.
_HYPHEN, _SPACE = "\N{NON-BREAKING HYPHEN}", "\N{NO-BREAK SPACE}"
_OTHERS = "Other options"


class HelpPage(click.HelpFormatter):
    """click's formatter, without line breaks inside ``clip-retrieval``, ``--keep`` or ``default: 0.9``."""

    def write_text(self, text: str) -> None:
        """Write paragraphs."""
        super().write_text(_protect(text))

    def write_dl(self, rows: Iterable[tuple[str, str]], col_max: int = 34, col_spacing: int = 2) -> None:
        """Write a list of names and their explanations."""
        super().write_dl([(name, _protect(text)) for name, text in rows], col_max, col_spacing)

    def write_examples(self, lines: Iterable[str]) -> None:
        """Write command lines, as a shell takes them."""
        with self.section("Examples"):
            for line in lines:
                self.write("".join(f"  {part}\n" for part in wrap_command(line, self.width - 2).split("\n")))

    def getvalue(self) -> str:
        """Return the page."""
        return super().getvalue().replace(_HYPHEN, "-").replace(_SPACE, " ")


def keep_together(text: str) -> str:
    """Forbid line breaks in a text."""
    return text.replace(" ", _SPACE)


def _protect(text: str) -> str:
    """Forbid line breaks at hyphens and in what stands between backticks."""
    return re.sub("`[^`]*`", lambda code: keep_together(code[0]), text).replace("-", _HYPHEN)


def format_page(command: click.Command, ctx: click.Context) -> str:
    """Return the help page of a command for the width of its context."""
    page = HelpPage(width=ctx.terminal_width, max_width=ctx.max_content_width)
    command.format_help(ctx, page)
    return page.getvalue().rstrip("\n")


class GroupedOption(click.Option):
    """An option that knows under which heading it is listed."""

    def __init__(self, *args: Any, group: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group = group

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Return the spelling and the explanation; of a switch that is off by default, only how to turn it on."""
        record = super().get_help_record(ctx)
        if record is None or not self.secondary_opts or self.default is True:
            return record
        return self.opts[0], record[1]


class GroupedCommand(click.Command):
    """A command whose ``--help`` lists arguments and options under headings, examples first."""

    def __init__(self, *args: Any, examples: str, arguments: list[tuple[str, str]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples = examples.strip().splitlines()
        self.arguments = arguments

    def get_help(self, ctx: click.Context) -> str:
        """Return the help page."""
        return format_page(self, ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples, the arguments, then each group of options in the order of the settings' fields."""
        assert isinstance(formatter, HelpPage)
        formatter.write_examples(self.examples)
        if self.arguments:
            with formatter.section("Arguments"):
                formatter.write_dl(self.arguments)
        groups: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for parameter in self.get_params(ctx):
            if isinstance(parameter, click.Argument):
                continue  # newer versions of click give these a line of their own
            record = parameter.get_help_record(ctx)
            if record is not None:
                groups[getattr(parameter, "group", _OTHERS)].append(record)
        for group, records in groups.items():
            with formatter.section(group):
                formatter.write_dl(records)
