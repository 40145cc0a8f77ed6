"""Help pages: flags under headings, and no name broken over two lines."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

import click

# click breaks lines at hyphens and spaces; these two stand in for those that must not be broken at until the page is done.
_HYPHEN, _SPACE = "\N{NON-BREAKING HYPHEN}", "\N{NO-BREAK SPACE}"
_WHOLE = re.compile(r"`[^`]*`|\[default: [^]]*\]")


class HelpPage(click.HelpFormatter):
    """click's formatter, without line breaks inside ``clip-retrieval``, ``--keep`` or ``[default: 0.9]``."""

    def write_text(self, text: str) -> None:
        """Write paragraphs."""
        super().write_text(_protect(text))

    def write_dl(self, rows: Iterable[tuple[str, str]], col_max: int = 34, col_spacing: int = 2) -> None:
        """Write a list of names and their explanations."""
        super().write_dl([(name, _protect(text)) for name, text in rows], col_max, col_spacing)

    def getvalue(self) -> str:
        """Return the page."""
        return super().getvalue().replace(_HYPHEN, "-").replace(_SPACE, " ")


def _protect(text: str) -> str:
    """Forbid line breaks at hyphens, in what stands between backticks, and in defaults."""
    return _WHOLE.sub(lambda whole: whole[0].replace(" ", _SPACE), text).replace("-", _HYPHEN)


class PageContext(click.Context):
    """click's context, whose help pages are of our formatter."""

    formatter_class = HelpPage


class PageCommand(click.Command):
    """A command whose ``--help`` lists its flags under headings."""

    context_class = PageContext

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write each group of flags, in their order."""
        groups: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and not isinstance(parameter, click.Argument):
                groups[getattr(parameter, "group", "Other options")].append(record)
        for group, records in groups.items():
            with formatter.section(group):
                formatter.write_dl(records)
