"""Sidecars that were edited or are of another version are refused; counts of skips; what a work directory holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sidecars import make_sidecar, unfinish

from clipcid_cli import typed
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats import sidecar as formats
from clipcid_cli.formats.embeddings.sidecar import EmbedSidecar
from clipcid_cli.formats.files import write_json, write_text
from clipcid_cli.formats.results.keep_list import BalanceSidecar
from clipcid_cli.formats.sidecar import Provenance, read_sidecar, run_again
from clipcid_cli.formats.skips import Skips
from clipcid_cli.formats.work_directory import WorkDirectory


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.pop("checksum"),
        lambda content: content.pop("model"),
        lambda content: content["counts"].update(images=4),
        lambda content: content["counts"].update(skipped={"no_image": 1e300}),
        lambda content: content["model"]["config"].update(text_cfg=None),
        lambda content: content.update(more=1),
    ],
)
def test_one_that_was_edited_at_any_depth_is_refused(tmp_path: Path, change: Any) -> None:
    path = tmp_path / "embed.json"
    content = make_sidecar(EmbedSidecar)
    for same in (json.dumps(content), json.dumps(dict(reversed(content.items())), indent=8)):
        path.write_text(same)
        assert read_sidecar(path, EmbedSidecar) is not None
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ClipcidError, match=r"embed\.json cannot be read as a sidecar .* it was edited") as found:
        read_sidecar(path, EmbedSidecar, "Make it again.")
    assert found.value.fix == "Make it again."


def test_a_secret_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(typed, "_words", ())
    run = Provenance(settings={}, inputs=[])
    entries = make_sidecar(BalanceSidecar)
    kept = {name: entries[name] for name in ("embeddings", "pictures", "result", "counts", "seconds")}
    typed.remember(["balance", "https://ann:pw@host/a.tar", "--keep", "0.5"])
    command = formats.make_sidecar(BalanceSidecar, "balance", run, kept).command
    assert command == ["clipcid", "balance", "https://REDACTED@host/a.tar", "--keep", "0.5"]


def test_a_recorded_command_is_shown_and_not_offered() -> None:
    entries = make_sidecar(BalanceSidecar, command=["clipcid", "balance", "a\nRun: rm -r ~"])
    fix = run_again("balance", msgspec.convert(entries, BalanceSidecar), keep=0.5)
    first, second = fix.split("\n")
    assert first == "Run balance again with --keep 0.5 --overwrite."
    assert second == r"The output that is there was made by: clipcid balance 'a\nRun: rm -r ~'"


@pytest.mark.parametrize(("version", "said"), [(1, "written by an earlier clipcid"), (99, "knows up to 2")])
def test_another_version_says_what_to_do(tmp_path: Path, version: int, said: str) -> None:
    (tmp_path / "embed.json").write_text(json.dumps({"format_version": version}))
    with pytest.raises(ClipcidError, match=said) as found:
        read_sidecar(tmp_path / "embed.json", EmbedSidecar)
    assert "--overwrite" in found.value.fix if version == 1 else "Upgrade" in found.value.fix


def test_counts_are_added_up_and_the_first_few_named() -> None:
    skips, others = Skips(), Skips()
    for number in range(4):
        skips.add("no_caption", f"a{number}")
        others.add("no_caption", f"b{number}")
    others.add("no_image", "c")
    skips.merge(others)
    assert skips.total == 9
    assert skips.describe() == "  8 × no caption: a0, a1, a2, a3, b0, …\n  1 × no image: c"


def test_too_many_is_an_error_with_both_numbers() -> None:
    skips = Skips()
    skips.add("unreadable_image", "shard 3: 00017")
    skips.check(100, 0.01, "data")
    with pytest.raises(
        ClipcidError, match=r"1 of 50 samples in data cannot be used: 2\.0%, more than the allowed 1\.0%"
    ) as raised:
        skips.check(50, 0.01, "data", "Do that.")
    assert "shard 3: 00017" in raised.value.message
    assert raised.value.fix.startswith("Do that.\nFix")
    assert "--max-bad-fraction" in raised.value.fix


def balance(work: WorkDirectory) -> None:
    write_text(work.balance / "keep.parquet", "rows")
    named = work.name_of(work.path / "embeddings" / "a")
    write_json(work.balance / "balance.json", make_sidecar(BalanceSidecar, embeddings=named))


def test_a_finished_keep_list_is_found_and_an_unfinished_one_not_passed_over(tmp_path: Path) -> None:
    work = WorkDirectory(tmp_path)
    assert work.find_keep_list() is None
    balance(work)
    assert work.find_keep_list() == tmp_path / "balance" / "keep.parquet"
    unfinish(work.balance, "balance")
    with pytest.raises(ClipcidError, match="is unfinished") as caught:
        work.find_keep_list()
    assert "--keep-list none" in caught.value.fix


def test_embeddings_are_those_that_were_balanced_or_the_only_ones(tmp_path: Path) -> None:
    work = WorkDirectory(tmp_path)
    with pytest.raises(ClipcidError, match="no embeddings") as caught:
        work.find_embeddings()
    assert "clipcid embed DATA" in caught.value.fix
    for slug in ("a", "b"):
        write_json(work.embeddings(slug) / "embed.json", make_sidecar(EmbedSidecar))
    with pytest.raises(ClipcidError, match="2 models: a, b"):
        work.find_embeddings()
    balance(work)
    assert work.find_embeddings() == tmp_path / "embeddings" / "a"
