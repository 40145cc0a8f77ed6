"""What cannot be balanced is refused with the same words by a dry run and by a run, which then leaves no keep list."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from balance_data import balance, make_rows, read_keep, write_embeddings
from conftest import shard_members, write_tar

from clipcid_cli.errors import ClipcidError

CASES: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("good", {"against": ("narrow",), "against_threshold": 0.1}, "have width 16, those in .*good 32"),
    ("good", {"against": ("zeros",), "against_threshold": 0.1}, "All 20 rows of .*zeros are zero or not finite"),
    ("good", {"against": ("pictures.tar",), "against_threshold": 0.1}, "does not record the model to embed it with"),
    ("good", {"max_caption_similarity": -0.99}, r"of none of the \d+ images is in the window to -0.99: they range"),
    ("good", {"max_per_cluster": 2}, "There are no clusters in"),
    ("good", {"max_per_cluster": 2, "clusters": "."}, "holds no finished clusters"),
    ("good", {"write_shards": "s"}, "needs the data itself"),
    ("good", {"write_shards": "s", "data": "no-such-data"}, "There is no data at"),
    ("good", {"select": "resolution"}, "--select resolution needs the data itself"),
    ("good", {"write_uids": "u.npy"}, "Sample '000000' has no uid of DataComp's"),
    ("narrow", {"min_caption_similarity": 0.1}, "contains no text embeddings"),
    ("narrow", {"select": "similarity"}, "contains no text embeddings"),
    ("zeros", {}, "None of the 20 rows of .*zeros is finite"),
    ("text", {}, "cannot be read"),
    ("empty", {}, "all without rows"),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of embeddings, of which only `good` can be balanced."""
    place = tmp_path_factory.mktemp("refused")
    rows = make_rows(20)
    write_embeddings(place / "good", rows, texts=rows, captions=[f"picture {row}" for row in range(20)])
    write_embeddings(place / "narrow", make_rows(20, width=16))
    write_embeddings(place / "zeros", np.zeros((20, 32), np.float16))
    write_embeddings(
        place / "repeated", rows, keys=[f"{row % 10}" for row in range(20)], shards=["a"] * 10 + ["b"] * 10
    )
    for name in ("text", "empty"):
        (place / name).mkdir()
    (place / "text" / "img_emb_0.npy").write_text("no array")
    np.save(place / "empty" / "img_emb_0.npy", np.empty((0, 8), np.float16))
    write_tar(place / "pictures.tar", shard_members(0, 2))
    return place


@pytest.mark.parametrize(("folder", "settings", "message"), CASES, ids=[case[2][:40] for case in CASES])
def test_a_dry_run_refuses_what_the_run_refuses(
    place: Path, tmp_path: Path, folder: str, settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    paths = {
        name: Path(value) for name, value in settings.items() if name in ("clusters", "write_shards", "write_uids")
    }
    told = []
    for is_dry in (True, False):
        work = tmp_path / ("dry" if is_dry else "run")
        with pytest.raises(ClipcidError, match=message) as refused:
            balance(work, place / folder, keep=0.5, dry_run=is_dry, max_bad_fraction=1.0, **settings | paths)
        told.append(str(refused.value).replace(str(work), "W"))
    assert told[0] == told[1]
    assert not (tmp_path / "dry").exists()
    assert not (tmp_path / "run" / "balance" / "keep.parquet").exists()


def test_all_images_are_near_a_reference(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ClipcidError, match="All 20 images are dropped before repeats are searched"):
        balance(tmp_path, place / "good", threshold=0.2, against=(str(place / "good"),))


def test_keys_that_repeat_are_refused_until_told_apart(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ClipcidError, match="Key '0' belongs to rows 0 and 10") as refused:
        balance(tmp_path, place / "repeated", keep=0.5)
    assert "--keys shard" in refused.value.fix
    balance(tmp_path, place / "repeated", keep=0.5, keys="shard")
    assert read_keep(tmp_path)["key"].tolist()[::10] == ["a/0", "b/0"]


def test_the_command_that_makes_clusters_names_the_embeddings(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ClipcidError) as refused:
        balance(tmp_path / "w", place / "repeated", keep=1.0, max_per_cluster=2, keys="shard")
    flags = f"--embeddings {place / 'repeated'} --keys shard --keep-list none --work {tmp_path / 'w'}"
    assert refused.value.fix == f"Give --clusters, or run: clipcid cluster {flags}"
