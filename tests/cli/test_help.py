"""Help pages, usage errors and exit codes of the command line."""

import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from conftest import Clipcid
from reference import DOCS, GENERATED, insert_reference

from clipcid_cli import typed
from clipcid_cli.cli import COMMANDS
from clipcid_cli.commands.failures import explain

HEAVY = ("torch", "open_clip", "numpy", "pandas", "pyarrow", "faiss")


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_and_usage_errors_need_no_torch(name: str) -> None:
    words = [name] if name else []
    probe = f"""
import sys
from clipcid_cli.cli import run
code = run([*{words!r}, "--help"]), run([*{words!r}, "--no-such-flag"])
assert code == (0, 2), code
assert not [heavy for heavy in {HEAVY!r} if heavy in sys.modules]
"""
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert "--no-such-flag" in done.stderr
    assert f"See {' '.join(['clipcid', *words])} --help." in done.stderr
    page = done.stdout
    assert page.startswith("Usage: clipcid")
    assert f"clipcid {name}" in page[page.index("Examples:") :] or not name
    for flag, text in re.findall(r"^  (-\S+.*?)(?:  +|\n +)(\S.*)$", page, flags=re.MULTILINE):
        assert len(text.split()) >= 2, f"{flag} is not explained"


def test_an_error_says_which_variable_or_file_a_flag_is_from(clipcid: Clipcid, tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text("[balance]\nkeep = 0.5\nagainst-threshold = 0.3\n")
    told = clipcid("balance", "--config", config, code=2).said
    assert f"without --against. (--against-threshold is from {config}.)" in told
    run = clipcid("balance", "--json", check=False, env={"CLIPCID_BALANCE_KEEP": "nan"})
    assert run.json["error"].endswith("(--keep is from CLIPCID_BALANCE_KEEP.)")
    run = clipcid("balance", "--keep", "nan", check=False)
    assert "is from" not in run.stderr


def test_a_variable_of_no_flag_is_a_usage_error(clipcid: Clipcid) -> None:
    others = {"CLIPCID_CACHE": "cache", "CLIPCID_CLUSTER_SEED": "1", "CLIPCID_EXPORT_LICENSE": "mit"}
    run = clipcid("balance", code=2, env=others | {"CLIPCID_BALANCE_KEP": "0.5"})
    assert "CLIPCID_CLUSTER_SEED is set in the environment" not in run.stderr
    assert "CLIPCID_BALANCE_KEP is set in the environment" in run.stderr
    assert "Did you mean CLIPCID_BALANCE_KEEP?" in run.stderr
    # Without the name of its command: of this one, else of one that has it.
    assert "Did you mean CLIPCID_CLUSTER_KEEP_LIST?" in clipcid("cluster", code=2, env={"CLIPCID_KEEP_LIST": "x"}).said
    assert "Did you mean CLIPCID_BALANCE_KEEP?" in clipcid("embed", code=2, env={"CLIPCID_KEEP": "0.5"}).said


def test_a_switch_that_is_neither_on_nor_off_is_a_usage_error(clipcid: Clipcid) -> None:
    run = clipcid("embed", code=2, env={"CLIPCID_QUIET": "perhaps"})
    assert "'perhaps' is neither true nor false (1 and 0, yes and no, on and off)." in run.said


@pytest.mark.parametrize(
    ("line", "fix"),
    [
        (["-late name.tar", "--model", "m"], "If the file -late name.tar is meant, write './-late name.tar'."),
        (["-later.tar"], "See clipcid embed --help."),  # there is no such file
        (["--", "-late name.tar", "--model", "m"], "What stands after -- is read as names, not as flags"),
    ],
)
def test_a_file_that_is_called_like_a_flag_can_be_named(
    line: list[str], fix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(typed, "_words", ("clipcid", "embed", *line))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "-late name.tar").touch()
    command = click.Command("embed", params=[click.Argument(["data"]), click.Option(["--model"])])
    with pytest.raises(click.UsageError) as refused:
        command.make_context("clipcid embed", line)
    failure = explain(refused.value)
    assert failure.fix.startswith(fix)
    assert failure.code == 2


def test_an_empty_request_for_completions_is_none(clipcid: Clipcid) -> None:
    assert clipcid("--version", env={"_CLIPCID_COMPLETE": ""}).stdout.count("clipcid, version") == 1


def test_debug_shows_where(clipcid: Clipcid) -> None:
    assert "Traceback" in clipcid("embed", "/no/such/folder", "--debug", check=False).stderr


@pytest.mark.parametrize("name", GENERATED)
def test_the_documents_hold_todays_help_pages_and_losses(name: str) -> None:
    document = (DOCS / name).read_text(encoding="utf-8")
    assert insert_reference(name, document) == document, "run: python tests/reference.py"
