"""Finding what earlier steps left in a work directory."""

from pathlib import Path

import pytest
from sidecars import make_sidecar, unfinish

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.files import write_json, write_text
from clipcid_cli.formats.sidecar import BalanceSidecar, EmbedSidecar
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


def test_the_repair_of_several_teachers_is_of_their_weights(tmp_path: Path) -> None:
    weightings = ((0.5, 0.5), (0.7, 0.3), (0.7, 0.3))
    one, other, again = (WorkDirectory(tmp_path).repair([Path("a"), Path("b")], weights) for weights in weightings)
    assert one != other == again


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
