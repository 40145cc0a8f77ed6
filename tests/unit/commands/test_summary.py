"""Lines end between words, commands stay commands, and of a table that is too wide names stand above their numbers."""

import io

import pytest
from rich.console import Console

from clipcid_cli.cli import run
from clipcid_cli.commands.console import ConsoleReporter
from clipcid_cli.commands.summary import print_facts, print_table, wrap
from clipcid_cli.steps.reporting import format_duration


def console(width: int) -> tuple[Console, io.StringIO]:
    shown = io.StringIO()
    return Console(file=shown, width=width), shown


def test_a_line_ends_between_words_and_a_path_after_a_slash() -> None:
    assert wrap("clip-retrieval's layout", 10) == "clip-retrieval's\nlayout"
    assert wrap("  indented words stay", 12) == "  indented\n  words stay"
    assert wrap("in some/where/far/away.json here", 14) == "in some/where/\nfar/away.json\nhere"


def test_a_time_is_a_plain_number_of_the_unit_that_fits() -> None:
    times = {0.04: "0.04 s", 99.4: "99 s", 99.6: "1.7 min", 5_969: "99 min", 5_971: "1.7 h", 172_799: "48 h"}
    times |= {172_800: "2 days", 86_400 * 99.4: "99 days", 86_400 * 1_234.5: "1,234 days"}
    assert {seconds: format_duration(seconds) for seconds in times} == times


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


def test_what_was_estimated_is_corrected() -> None:
    log, shown = console(1000)
    with ConsoleReporter(log).progress("embed", None, "images") as progress:
        progress.advance(3)
        progress.expect(12)
        progress.print_line()
        progress.advance(4)  # the end says how many there were
    assert [line.partition(" images")[0] for line in shown.getvalue().splitlines()] == ["embed: 3/12", "embed: 7/7"]


def test_a_bar_keeps_eight_columns_beside_any_label_and_the_largest_numbers() -> None:
    for label, total in (("search", 8e16), ("embed", 400_000_000), ("student on classification test", 123_456)):
        shown = io.StringIO()
        terminal = Console(file=shown, width=80, force_terminal=True, color_system=None)
        with ConsoleReporter(terminal).progress(label, total, "images") as progress:
            progress.advance(total / 2)
        last = [line for line in shown.getvalue().splitlines() if "━" in line][-1]
        assert "━" * 8 in last
        assert last.rstrip().endswith(" s")
    assert "trillion" not in last


def test_a_table_that_is_too_wide_has_names_above_its_numbers_and_then_a_line_for_each_cell() -> None:
    columns, rows = ["run", "steps", "R@1"], [["a-long-name", "600", "3.7"], ["a-long-name", "50", "2"]]
    beside = ["run          steps  R@1", "a-long-name    600  3.7", "a-long-name     50    2"]
    above = ["run", "    steps  R@1", "a-long-name", "      600  3.7", "       50    2"]
    cells = ["run: a-long-name", "steps: 600", "R@1: 3.7", "", "run: a-long-name", "steps: 50", "R@1: 2"]
    for width, expected in ((23, beside), (22, above), (13, cells)):
        log, shown = console(width)
        print_table(log, "Runs", columns, rows)
        assert shown.getvalue().splitlines() == ["Runs", *expected]


@pytest.mark.parametrize("width", [80, 10_000])
def test_what_a_name_says_to_the_terminal_is_shown_as_text(width: int) -> None:
    name = "a\x1b]0;owned\x07\u202e\rb?token=abc"
    address = f"https://ann:pw@host/{name}"
    log, shown = console(width)
    reporter = ConsoleReporter(log)
    reporter.note(address)
    reporter.warn(address)
    with reporter.progress(address, 3, "images") as progress:
        progress.advance(3)
        progress.show(data=address)
    print_facts(log, address, {address: address}, {address: address})
    print_table(log, address, [address], [[address]])
    text = "".join(shown.getvalue().split())
    seen = r"https://REDACTED@host/a\x1b]0;owned\x07\u202e\x0db?token=REDACTED"
    assert text.count(seen) == 12
    assert text.isprintable()
    assert "pw" not in text


def test_an_error_shows_control_characters_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["embed", "--config", "no\x1b]0;owned\x07\x9b2J.toml"]) == 2
    assert r"--config no\x1b]0;owned\x07\x9b2J.toml cannot be read" in capsys.readouterr().err
