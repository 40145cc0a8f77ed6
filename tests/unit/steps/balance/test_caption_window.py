"""The caption window: which images are dropped before repeats are searched, against pandas and a balance of the rest."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from balance_data import balance, make_rows, read_keep, write_embeddings

from clipcid_cli.algorithms.near.exact import cosine_similarities
from clipcid_cli.errors import ClipcidError, UsageError
from clipcid_cli.steps.settings.balance import BalanceSettings

NUM_ROWS = 400


def make_pairs() -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Images, texts at all angles to them, and captions, some of them empty; two text rows are not usable."""
    rows, generator = make_rows(NUM_ROWS), np.random.default_rng(5)
    texts = rows + generator.random((NUM_ROWS, 1)) * generator.normal(size=rows.shape)
    texts = (texts / np.linalg.norm(texts, axis=1, keepdims=True)).astype(np.float16)
    texts[7], texts[11] = 0.0, np.nan
    return rows, texts, ["" if row % 29 == 0 else f"picture {row}" for row in range(NUM_ROWS)]


def test_cosines_are_those_of_float64() -> None:
    rows, texts, _ = make_pairs()
    a, b = rows.astype(np.float64), texts.astype(np.float64)
    with np.errstate(invalid="ignore"):
        expected = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    found = cosine_similarities(rows, texts)
    np.testing.assert_allclose(found, expected.astype(np.float32), rtol=2e-7)
    assert np.flatnonzero(np.isnan(found)).tolist() == [7, 11]


@pytest.mark.parametrize(
    ("window", "amount"),
    [
        ({"min_caption_similarity": 0.5}, {"keep": 0.6}),
        ({"max_caption_similarity": 0.8}, {"threshold": 0.5, "linkage": "star"}),
        ({"min_caption_similarity": 0.4, "max_caption_similarity": 0.9}, {"keep": 0.4, "select": "similarity"}),
        ({"min_caption_similarity": 0.4, "max_caption_similarity": 0.9}, {"keep": 1.0}),
    ],
)
def test_the_rest_is_balanced_as_if_it_were_alone(tmp_path: Path, window: dict, amount: dict) -> None:
    rows, texts, captions = make_pairs()
    rows[3] = np.nan  # a row of the embeddings, but not of the keep list
    folder = write_embeddings(tmp_path / "all", rows, 3, texts=texts, captions=captions)
    result, _ = balance(tmp_path / "work", folder, **window, **amount)
    keep = read_keep(tmp_path / "work")
    low, high = window.get("min_caption_similarity"), window.get("max_caption_similarity")
    below = keep["caption_similarity"] < np.float32(-2 if low is None else low)
    above = keep["caption_similarity"] > np.float32(2 if high is None else high)
    without = keep["caption_similarity"].isna()
    inside = ~(below | above | without)
    assert result["caption_window"] == {
        "min": low,
        "max": high,
        "inside": inside.sum(),
        "below": below.sum(),
        "above": above.sum(),
        "without": without.sum(),
    }
    assert 0 < inside.sum() < NUM_ROWS - 1 == result["images"] == len(keep)
    has_none = [row for row in range(NUM_ROWS) if captions[row] == "" or row in (7, 11)]
    assert keep["key"][without].astype(int).tolist() == [row for row in has_none if row != 3]
    sidecar = json.loads((tmp_path / "work" / "balance" / "balance.json").read_text())
    assert sidecar["result"]["caption_window"] == result["caption_window"]
    assert (keep["dropped_by"][~inside] == "caption").all()
    outside = keep[~inside]
    assert outside[["representative", "distance"]].isna().all(axis=None)
    assert not outside["kept"].any()
    assert (outside["component"] == outside.index).all()
    assert (outside["component_size"] == 1).all()

    chosen = keep["key"][inside].astype(int).to_numpy()
    alone = write_embeddings(
        tmp_path / "some",
        rows[chosen],
        keys=keep["key"][inside].tolist(),
        texts=texts[chosen],
        captions=[captions[row] for row in chosen],
    )
    expected, _ = balance(tmp_path / "other", alone, **amount)
    names = ("kept", "threshold", "components", "largest_component", "uncovered_ratio", "other_linkage")
    assert {name: result[name] for name in names} == {name: expected[name] for name in names}
    there, here = read_keep(tmp_path / "other"), keep[inside].reset_index()
    for name in ("key", "component_size", "kept", "representative", "distance"):
        pd.testing.assert_series_equal(here[name], there[name])
    assert here["dropped_by"].isna().tolist() == there["kept"].tolist()
    assert set(here["dropped_by"].dropna()) <= {"repeat"}
    # Sets and edges are numbered by the rows of the keep list.
    position = np.flatnonzero(inside)
    assert here["component"].tolist() == position[there["component"]].tolist()
    forest = pd.read_parquet(tmp_path / "work" / "balance" / "forest-filtered.parquet")
    other = pd.read_parquet(tmp_path / "other" / "balance" / "forest.parquet")
    assert forest["a"].tolist() == position[other["a"]].tolist()
    assert forest["b"].tolist() == position[other["b"]].tolist()
    assert forest["distance"].tolist() == other["distance"].tolist()


def test_another_amount_needs_no_search_and_the_forest_of_all_images_stays(tmp_path: Path) -> None:
    rows, texts, captions = make_pairs()
    folder, work = write_embeddings(tmp_path / "e", rows, texts=texts, captions=captions), tmp_path / "work"
    balance(work, folder, keep=0.5)
    whole = (work / "balance" / "forest.parquet").read_bytes()
    balance(work, folder, keep=0.5, min_caption_similarity=0.5)
    first = read_keep(work)
    _, told = balance(work, folder, keep=0.7, min_caption_similarity=0.5)
    assert "The forest of these embeddings exists" in told
    assert (work / "balance" / "forest.parquet").read_bytes() == whole
    _, told = balance(work, folder, keep=0.5, min_caption_similarity=0.6)
    assert "The forest of these embeddings exists" not in told
    balance(work, folder, keep=0.5, min_caption_similarity=0.5)
    pd.testing.assert_frame_equal(read_keep(work), first)
    _, told = balance(work, folder, keep=0.5)
    assert "The forest of these embeddings exists" in told
    assert "dropped_by" not in read_keep(work)
    page = (work / "balance" / "report.html").read_text()
    assert "Similarity to captions" not in page


def test_pairs_are_written_for_repeats_alone_and_the_report_shows_the_window(tmp_path: Path) -> None:
    rows, texts, captions = make_pairs()
    folder, work = write_embeddings(tmp_path / "e", rows, texts=texts, captions=captions), tmp_path / "work"
    balance(work, folder, keep=0.5, max_caption_similarity=0.8, write_pairs=tmp_path / "pairs.csv")
    keep, pairs = read_keep(work), pd.read_csv(tmp_path / "pairs.csv", dtype={"from": str, "to": str})
    assert pairs["from"].tolist() == keep["key"][keep["dropped_by"] == "repeat"].tolist()
    assert set(pairs["to"]) <= set(keep["key"][keep["kept"]])
    page = (work / "balance" / "report.html").read_text()
    assert "Similarity to captions" in page
    assert "Histogram of the similarity of images to their captions" in page


def test_folders_without_captions_but_with_texts_have_similarities(tmp_path: Path) -> None:
    rows, texts, _ = make_pairs()
    result, _ = balance(
        tmp_path / "w", write_embeddings(tmp_path / "e", rows, texts=texts), keep=1.0, min_caption_similarity=0.5
    )
    assert result["caption_window"]["without"] == 2


def test_without_captions_the_image_most_similar_to_its_text_is_kept(tmp_path: Path) -> None:
    rows = np.repeat(make_rows(20), 3, axis=0)
    generator = np.random.default_rng(1)
    texts = rows + generator.random((60, 1)) * generator.normal(size=rows.shape)
    texts = (texts / np.linalg.norm(texts, axis=1, keepdims=True)).astype(np.float16)
    texts[4] = np.nan
    folder = write_embeddings(tmp_path / "e", rows, texts=texts)
    _, told = balance(tmp_path / "w", folder, threshold=0.0, select="similarity")
    keep = read_keep(tmp_path / "w")
    score = (rows.astype(np.float64) * texts).sum(1)
    score[4] = -np.inf
    expected = (
        keep.assign(score=-score, row=np.arange(60)).sort_values(["score", "row"]).groupby("component")["row"].first()
    )
    assert np.flatnonzero(keep["kept"]).tolist() == sorted(expected)
    assert sorted(expected) != keep.groupby("component")["key"].first().astype(int).tolist()
    assert "1 text embeddings of images in groups are zero or not finite" in told


def read_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    rows, texts, captions = make_pairs()
    bare = write_embeddings(tmp_path / "bare", rows)
    with pytest.raises(ClipcidError, match="contains no text embeddings"):
        balance(tmp_path / "w", bare, keep=0.5, min_caption_similarity=0.1)
    assert not (tmp_path / "w" / "balance").exists()
    folder = write_embeddings(tmp_path / "e", rows, texts=texts, captions=captions)
    with pytest.raises(
        ClipcidError, match=r"none of the 400 images is in the window from -1 to -0\.9: they range from"
    ):
        balance(tmp_path / "w", folder, keep=0.5, min_caption_similarity=-1.0, max_caption_similarity=-0.9)
    assert not (tmp_path / "w" / "balance" / "keep.parquet").exists()
    # Nothing is lost of a result that is there.
    balance(tmp_path / "w", folder, keep=0.5)
    before = read_files(tmp_path / "w" / "balance")
    with pytest.raises(ClipcidError, match=r"is in the window to -0\.9"):
        balance(tmp_path / "w", folder, keep=0.5, max_caption_similarity=-0.9)
    assert read_files(tmp_path / "w" / "balance") == before
    _, told = balance(tmp_path / "w", folder, keep=0.5)
    assert "already holds this result" in told
    with pytest.raises(UsageError, match=r"--min-caption-similarity 0\.3 is above --max-caption-similarity 0\.2"):
        BalanceSettings(keep=0.5, min_caption_similarity=0.3, max_caption_similarity=0.2)
