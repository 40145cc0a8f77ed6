"""Finding what earlier steps left in a work directory."""

import shutil
from pathlib import Path

import pytest
from sidecars import make_sidecar, unfinish

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.atomic import write_json, write_text
from clipcid_cli.formats.sidecar import BalanceSidecar, DistillSidecar, EmbedSidecar
from clipcid_cli.formats.work_directory import WorkDirectory


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
    assert work.find_embeddings("b") == tmp_path / "embeddings" / "b"


def test_a_copied_work_directory_reads_its_own_embeddings(tmp_path: Path) -> None:
    original = WorkDirectory(tmp_path / "original")
    original.embeddings("a").mkdir(parents=True)
    balance(original)
    assert original.name_of(tmp_path / "elsewhere") == str(tmp_path / "elsewhere")
    shutil.copytree(original.path, tmp_path / "copy")
    assert WorkDirectory(tmp_path / "copy").find_embeddings() == tmp_path / "copy" / "embeddings" / "a"


def test_the_student_is_that_of_the_run_that_finished_last(tmp_path: Path) -> None:
    work = WorkDirectory(tmp_path)
    with pytest.raises(ClipcidError, match="no trained student"):
        work.find_student()
    for name in ("first", "second"):
        write_json(work.distill(name) / "distill.json", make_sidecar(DistillSidecar))
    assert work.find_student() == tmp_path / "distill" / "second" / "student"
