"""`balance --dry-run` with filters: what they would take. What the run would refuse is refused, and nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from balance_data import Listener, balance, make_rows, write_embeddings
from conftest import shard_members, write_tar
from sidecars import leave_work

from clipcid_cli.errors import ClipcidError
from clipcid_cli.steps.balance import cost
from clipcid_cli.steps.cluster.run import run as run_cluster
from clipcid_cli.steps.embed.run import run as run_embed
from clipcid_cli.steps.settings.cluster import ClusterSettings
from clipcid_cli.steps.settings.embed import EmbedSettings

NUM_ROWS = 300


@pytest.fixture
def embeddings(tmp_path: Path) -> Path:
    rows, generator = make_rows(NUM_ROWS), np.random.default_rng(3)
    rows[5] = np.nan
    texts = rows + generator.random((NUM_ROWS, 1)) * generator.normal(size=rows.shape)
    texts = (texts / np.linalg.norm(texts, axis=1, keepdims=True)).astype(np.float16)
    captions = ["" if row % 10 == 0 else f"picture {row}" for row in range(NUM_ROWS)]
    return write_embeddings(tmp_path / "e", rows, 3, texts=texts, captions=captions)


@pytest.fixture
def is_untouched(tmp_path: Path) -> Callable[[], bool]:
    """Tells whether the work directory is as it was when this was asked for first."""
    states: list[dict[Path, int]] = []

    def look() -> bool:
        states.append({path: path.stat().st_mtime_ns for path in (tmp_path / "w").rglob("*")})
        return states[0] == states[-1]

    return look


def test_each_filter_says_what_it_takes(tmp_path: Path, embeddings: Path, is_untouched: Callable[[], bool]) -> None:
    work, others = tmp_path / "w", make_rows(90, seed=2)
    others[4] = np.inf
    reference = str(write_embeddings(tmp_path / "r", others))
    run_cluster(
        ClusterSettings(work=work, embeddings=embeddings, keep_list="none", num_clusters=8, device="cpu"), Listener()
    )
    is_untouched()
    plain, _ = balance(work, embeddings, keep=0.5, dry_run=True)
    assert (plain["against"], plain["caption_window"], plain["clustered_images"]) == (None, None, None)
    assert plain["searched"] == plain["images"] == NUM_ROWS
    window = {"min_caption_similarity": 0.5, "max_caption_similarity": 0.9}
    call = {"keep": 0.5, "against": (reference, reference), "against_threshold": 0.3, "max_per_cluster": 4, **window}
    result, told = balance(work, embeddings, dry_run=True, **call)
    assert is_untouched()
    one, other = result["against"]
    assert (
        {**one, "seconds": 0}
        == {**other, "seconds": 0}
        == {
            "name": reference,
            "rows": 90,
            "to_embed": False,
            "embed_seconds": 0.0,
            "pairs": 90 * NUM_ROWS,
            "seconds": 0,
        }
    )
    assert 0.0 < one["seconds"] < 60.0
    found, _ = balance(tmp_path / "real", embeddings, keep=0.5, **window)
    assert result["caption_window"]["sampled"] == NUM_ROWS - 1
    assert result["caption_window"]["inside"] == found["caption_window"]["inside"] / (NUM_ROWS - 1)
    assert 0.0 < result["caption_window"]["seconds"] < 60.0
    searched = result["searched"]
    assert searched == found["caption_window"]["inside"] < NUM_ROWS
    assert result["pairs"] == searched * (searched - 1) // 2
    assert result["clustered_images"] == NUM_ROWS - 1
    width = 32
    assert result["memory"]["mapped"] == 2 * width * (2 * NUM_ROWS + 2 * 90)  # images, captions, two references
    assert result["disk"] > plain["disk"]
    for line in (
        f"Cost of a new search of {searched} of them",
        f"against {reference}: 90 images; 27,000 pairs",
        f"{searched / (NUM_ROWS - 1):.1%} of 299 sampled images are inside the window",
        f"clusters are capped: {work / 'clusters'}, 299 images",
    ):
        assert line in told


def test_of_large_files_some_stretches_are_measured_and_a_rare_window_has_an_upper_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "_SAMPLED", 40)
    rows = make_rows(NUM_ROWS)
    texts = -rows
    texts[250] = rows[250]
    folder = write_embeddings(tmp_path / "e", rows, 1, texts=texts)
    balanced, told = balance(tmp_path / "w", folder, keep=0.5, min_caption_similarity=0.5, dry_run=True)
    assert (balanced["caption_window"]["sampled"], balanced["caption_window"]["inside"]) == (40, 0.0)
    assert balanced["searched"] == 22
    assert balanced["pairs"] == 22 * 21 // 2
    assert "Cost of a new search of at most 22 of them" in told
    assert "none of 40 sampled images is inside the window, so at most 7.5% of all images are" in told


def test_images_to_embed_are_counted_and_not_embedded(
    tmp_path: Path, tiny_model: Path, is_untouched: Callable[[], bool]
) -> None:
    write_tar(tmp_path / "0.tar", shard_members(0, 8))
    write_tar(tmp_path / "r.tar", shard_members(0, 3))
    made = {"model": str(tiny_model), "text": False, "workers": 0, "device": "cpu"}
    run_embed(EmbedSettings(data=str(tmp_path / "0.tar"), work=tmp_path / "w", **made), Listener())
    (folder,) = (tmp_path / "w" / "embeddings").iterdir()
    is_untouched()
    call = {"threshold": 0.1, "against": (str(tmp_path / "r.tar"),), "workers": 0}
    result, told = balance(tmp_path / "w", folder, dry_run=True, **call)
    assert is_untouched()
    assert "3 images to embed first, about" in told
    (found,) = result["against"]
    assert (found["rows"], found["to_embed"], found["pairs"]) == (3, True, 24)
    assert found["embed_seconds"] >= 0.0
    balance(tmp_path / "w", folder, **call)
    (reference,) = (tmp_path / "w" / "references").iterdir()
    left = leave_work(reference, "embed")
    result, told = balance(tmp_path / "w", folder, dry_run=True, **call)
    assert not result["against"][0]["to_embed"]
    assert left.exists()
    balance(tmp_path / "w", folder, **call)
    assert not left.exists()


def test_what_the_run_refuses_at_its_start_a_dry_run_refuses(tmp_path: Path, embeddings: Path) -> None:
    narrow = str(write_embeddings(tmp_path / "narrow", make_rows(20, width=16)))
    without_texts = write_embeddings(tmp_path / "images", make_rows(20))
    pictures = write_tar(tmp_path / "pictures.tar", shard_members(0, 2))
    unusable = np.zeros((20, 32), np.float16)
    zeros = str(write_embeddings(tmp_path / "zeros", unusable))
    not_finite = write_embeddings(tmp_path / "nan", np.full_like(unusable, np.nan))
    refused = [
        (embeddings, {"against": (narrow,), "against_threshold": 0.1}, "have width 16, those in"),
        (embeddings, {"against": (zeros,), "against_threshold": 0.1}, "All 20 rows of .*zeros are zero or not finite"),
        (not_finite, {}, "None of the 20 rows of .*nan is finite"),
        (not_finite, {"against": (str(embeddings),), "against_threshold": 0.1}, "None of the 20 rows of .*nan is"),
        (embeddings, {"against": (str(pictures),), "against_threshold": 0.1}, "does not record the model to embed it"),
        (embeddings, {"max_caption_similarity": -0.99}, r"of none of the \d+ images is in the window to -0.99: they"),
        (without_texts, {"min_caption_similarity": 0.1}, "contains no text embeddings"),
        (without_texts, {"select": "similarity"}, "contains no text embeddings"),
        (embeddings, {"max_per_cluster": 2}, "There are no clusters in"),
        (embeddings, {"max_per_cluster": 2, "clusters": tmp_path}, "holds no finished clusters"),
        (embeddings, {"write_shards": tmp_path / "s"}, "needs the data itself"),
        (embeddings, {"select": "resolution"}, "--select resolution needs the data itself"),
        (embeddings, {"write_uids": tmp_path / "u.npy"}, "uid"),
    ]
    for number, (folder, settings, message) in enumerate(refused):
        told = []
        for work in (tmp_path / "dry", tmp_path / f"run{number}"):
            with pytest.raises(ClipcidError, match=message) as error:
                balance(work, folder, keep=0.5, dry_run=work.name == "dry", **settings)
            told.append(str(error.value).replace(str(work), "W"))
        assert not (tmp_path / "dry").exists()
        assert told[0] == told[1]
