"""Lines end between words, commands stay commands, and a table that is too wide becomes lines of name and value."""

import io

from rich.console import Console

from clipcid_cli.commands.console import ConsoleReporter
from clipcid_cli.commands.summary import print_facts, print_table, wrap, wrap_command


def console(width: int) -> tuple[Console, io.StringIO]:
    shown = io.StringIO()
    return Console(file=shown, width=width), shown


def test_a_line_ends_between_words_and_a_path_after_a_slash() -> None:
    assert wrap("clip-retrieval's layout", 10) == "clip-retrieval's\nlayout"
    assert wrap("  indented words stay", 12) == "  indented\n  words stay"
    assert wrap("in some/where/far/away.json here", 14) == "in some/where/\nfar/away.json\nhere"


def test_a_command_goes_on_after_a_backslash() -> None:
    assert wrap_command("clipcid distill --teacher A --student B", 28) == (
        "clipcid distill \\\n    --teacher A \\\n    --student B"
    )
    quoted = "clipcid cluster --keep-list '/mnt/summer holidays - copy/keep.parquet' --work /mnt"
    assert wrap_command(quoted, 40) == (
        "clipcid cluster \\\n    --keep-list '/mnt/summer holidays - copy/keep.parquet' \\\n    --work /mnt"
    )
    assert wrap("Name the list: --keep-list '/mnt/a b/keep.parquet'", 24) == (
        "Name the list:\n  --keep-list '/mnt/a b/keep.parquet'"
    )
    assert wrap("Run: clipcid cluster --overwrite", 24) == "Run:\n  clipcid cluster \\\n      --overwrite"


def test_a_table_that_does_not_fit_is_lines_of_name_and_value() -> None:
    columns, rows = ("model", "data"), [("taught-student", "classification"), ("teacher", "retrieval")]
    wide, shown = console(30)
    print_table(wide, "T", columns, rows, left=2)
    assert shown.getvalue() == ("T\nmodel           data\ntaught-student  classification\nteacher         retrieval\n")
    narrow, shown = console(29)
    print_table(narrow, "T", columns, rows, left=2)
    assert shown.getvalue() == ("T\nmodel: taught-student\ndata: classification\n\nmodel: teacher\ndata: retrieval\n")


def test_a_value_too_long_beside_its_name_starts_on_the_next_line() -> None:
    narrow, shown = console(20)
    print_facts(narrow, "", {"kept": "two of three images", "file": "work/eval/metrics.json"})
    assert shown.getvalue() == "kept  two of three\n      images\nfile\n  work/eval/\n  metrics.json\n"


def test_a_log_gets_a_line_of_numbers_in_the_end_and_nothing_where_there_is_nothing_to_do() -> None:
    log, shown = console(1000)
    reporter = ConsoleReporter(log)
    with reporter.progress("embed", 0, "images"):
        pass
    with reporter.progress("embed", 3, "images") as progress:
        progress.advance(3)
        progress.show(loss=0.5)
    assert shown.getvalue().startswith("embed: 3/3 images, ")
    assert shown.getvalue().endswith(" s, loss=0.5\n")
    assert shown.getvalue().count("\n") == 1
