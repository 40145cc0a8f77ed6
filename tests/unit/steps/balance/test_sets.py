"""Sets of one amount, whichever way it is given: single linkage and stars, ties and copies, and what stands for a set."""

from __future__ import annotations

import dataclasses
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from balance_data import balance, begun, check_keep_list, distance_matrix, make_rows, read_keep, write_embeddings

from clipcid_cli.algorithms.near.edges import Edges
from clipcid_cli.algorithms.sets import star
from clipcid_cli.algorithms.sets.star import star_cover
from clipcid_cli.errors import ClipcidError
from clipcid_cli.steps.balance import compute, covers, sets
from clipcid_cli.steps.balance import pairs as balance_pairs
from clipcid_cli.steps.balance.balance_run import BalanceRun
from clipcid_cli.steps.balance.find_forest import find_forest
from clipcid_cli.steps.balance.linkages import LINKAGES, Linkage
from clipcid_cli.steps.balance.pairs import collect_pairs
from clipcid_cli.steps.balance.sets import Division, single_curve
from clipcid_cli.steps.balance.stored_forest import Forest

NUM_ROWS = 300


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    return make_rows(NUM_ROWS)


@pytest.fixture(scope="module")
def embeddings(rows: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A read-only folder of embeddings."""
    return write_embeddings(tmp_path_factory.mktemp("embeddings") / "foreign", rows)


def read_bytes(work: Path) -> list[bytes]:
    return [(work / "balance" / name).read_bytes() for name in ("keep.parquet", "curve.csv")]


def test_threshold_and_cosine_distance_are_the_same_cutoff(embeddings: Path, rows: np.ndarray, tmp_path: Path) -> None:
    by_cosine, _ = balance(tmp_path / "c", embeddings, cosine_distance=0.02)
    by_distance, _ = balance(tmp_path / "t", embeddings, threshold=0.2)
    assert by_cosine["threshold"] == by_distance["threshold"] == 0.2
    assert read_bytes(tmp_path / "c") == read_bytes(tmp_path / "t")
    check_keep_list(read_keep(tmp_path / "c"), rows)


@pytest.mark.parametrize("linkage", ["single", "star"])
def test_copies_beyond_the_target_all_go_and_it_is_said(tmp_path: Path, linkage: str) -> None:
    rows = make_rows(50, num_centroids=50)[np.arange(200) % 50]
    result, said = balance(tmp_path, write_embeddings(tmp_path / "copies", rows), keep=0.5, linkage=linkage)
    distinct = len(np.unique(rows, axis=0))
    assert (result["kept"], result["threshold"]) == (distinct, 0.0)
    assert f"{distinct} images are kept, {100 - distinct} fewer than requested" in said
    check_keep_list(read_keep(tmp_path), rows)


def test_ties_at_the_cutoff_all_merge_and_it_is_said(tmp_path: Path) -> None:
    turned = 0.8 * np.eye(24) + 0.6 * np.roll(np.eye(24), 1, axis=1)
    rows = np.concatenate([np.eye(24), turned]).astype(np.float16)
    result, said = balance(tmp_path, write_embeddings(tmp_path / "ties", rows), keep=0.9)
    assert result["kept"] < round(0.9 * 48)
    assert f"Pairs tie at the cut-off {result['threshold']:.6g}, and all of them merge" in said
    check_keep_list(read_keep(tmp_path), rows)


def test_a_bisection_for_stars_that_is_stopped_goes_on(
    embeddings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = list[None]()
    stops = set[int]()

    def cover(*given: Any) -> Any:
        if len(made) in stops:
            raise KeyboardInterrupt
        made.append(None)
        return star_cover(*given)

    monkeypatch.setattr(star, "star_cover", cover)
    monkeypatch.setattr(covers.SavePace, "is_due", lambda pace: True)
    balance(tmp_path / "whole", embeddings, keep=0.5, linkage="star")
    whole = len(made)
    made.clear()
    for count in (2, 5):
        stops.add(count)
        with pytest.raises(KeyboardInterrupt):
            balance(tmp_path / "stopped", embeddings, keep=0.5, linkage="star")
        stops.clear()
    balance(tmp_path / "stopped", embeddings, keep=0.5, linkage="star")
    assert read_bytes(tmp_path / "stopped") == read_bytes(tmp_path / "whole")
    assert whole <= len(made) <= whole + 2  # each start makes the cover that the last one ended with
    # What is left of a run is of no use for another share.
    balance(tmp_path / "other", embeddings, keep=0.4, linkage="star")
    stops.add(len(made) + 5)
    with pytest.raises(KeyboardInterrupt):
        balance(tmp_path / "stopped", embeddings, keep=0.6, linkage="star")
    stops.clear()
    balance(tmp_path / "stopped", embeddings, keep=0.4, linkage="star")
    assert read_bytes(tmp_path / "stopped") == read_bytes(tmp_path / "other")


def test_a_bisection_does_not_go_on_for_rows_with_other_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = list[None]()
    stop = -1

    def cover(*given: Any) -> Any:
        if len(made) == stop:
            raise KeyboardInterrupt
        made.append(None)
        return star_cover(*given)

    def balance_captioned(work: str, **window: float) -> None:
        made.clear()
        balance(tmp_path / work, folder, keep=0.5, linkage="star", **window)

    monkeypatch.setattr(star, "star_cover", cover)
    monkeypatch.setattr(covers.SavePace, "is_due", lambda pace: True)
    rows = np.eye(24) + np.random.default_rng(0).uniform(0, 0.5, (24, 24))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True))[[*range(24), 0, 1]].astype(np.float16)
    # One filter drops the copy of the first image, the other that of the second.
    similarity = np.array([0.6] * 24 + [0.3, 0.9])[:, None]
    across = np.roll(rows, 1, axis=1) - (np.roll(rows, 1, axis=1) * rows).sum(axis=1, keepdims=True) * rows
    across /= np.linalg.norm(across, axis=1, keepdims=True)
    texts = (similarity * rows + np.sqrt(1 - similarity**2) * across).astype(np.float16)
    folder = write_embeddings(tmp_path / "copies", rows, texts=texts, captions=["a cat"] * 26)
    balance_captioned("other", max_caption_similarity=0.8)
    whole = len(made)
    stop = whole - 1
    with pytest.raises(KeyboardInterrupt):
        balance_captioned("stopped", min_caption_similarity=0.5)
    stop = -1
    balance_captioned("stopped", max_caption_similarity=0.8)
    assert len(made) == whole
    assert read_bytes(tmp_path / "stopped") == read_bytes(tmp_path / "other")


def test_sets_that_took_long_are_not_measured_again(
    embeddings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    balance(tmp_path / "whole", embeddings, keep=0.5)
    balance(tmp_path / "other", embeddings, keep=0.5, select="medoid")
    monkeypatch.setattr(sets, "_LONG_SECONDS", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(compute, "compare_linkages", Mock(side_effect=KeyboardInterrupt))
        for work in ("stopped", "begun"):
            with pytest.raises(KeyboardInterrupt):
                balance(tmp_path / work, embeddings, keep=0.5)
    balance(tmp_path / "begun", embeddings, keep=0.5, select="medoid")  # of another choice
    assert read_bytes(tmp_path / "begun") == read_bytes(tmp_path / "other")
    monkeypatch.setattr(sets, "work_on_groups", Mock(side_effect=AssertionError))
    balance(tmp_path / "stopped", embeddings, keep=0.5)
    assert read_bytes(tmp_path / "stopped") == read_bytes(tmp_path / "whole")


def test_stars_that_miss_the_target_without_ties_are_not_said_to_tie(tmp_path: Path) -> None:
    rows = np.random.default_rng(43).normal(size=(8, 8))  # the tenth pair turns four stars into two
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)
    result, said = balance(tmp_path, write_embeddings(tmp_path / "stars", rows), keep=3 / 8, linkage="star")
    assert result["kept"] == 2
    cutoff = f"{result['threshold']:.6g}"
    assert f"drop several images, as at the cut-off {cutoff}: 2 images are kept, 1 fewer than requested" in said
    assert "chain" not in said


def test_all_pairs_are_collected_from_a_forest_or_refused(
    embeddings: Path, rows: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    balance(tmp_path, embeddings, threshold=0.4)
    with begun(tmp_path, embeddings, threshold=0.4, linkage="star") as run:
        forest, _ = find_forest(run, searched_to=0.4)
        pairs = collect_pairs(run, forest, 0.4)
        unique = np.triu(distance_matrix(rows[run.rows.unique]) <= np.float32(0.4), k=1)
        np.testing.assert_array_equal(sorted(zip(pairs.a, pairs.b, strict=True)), np.argwhere(unique))
        # The components of a forest that ends before would lack pairs.
        with pytest.raises(AssertionError, match="all edges up to the distance"):
            collect_pairs(run, forest, 0.5)
        monkeypatch.setattr(balance_pairs, "_MAX_COLLECTED", len(pairs) - 1)
        with pytest.raises(
            ClipcidError, match=f"{len(pairs) - 1:,} pairs .* 0.4000 of each other. --linkage star holds"
        ):
            collect_pairs(run, forest, 0.4)


def divide_by_twos(run: BalanceRun, forest: Forest, threshold: float, num_kept: int) -> tuple[Division, Forest]:
    """Join each two images within the threshold, the nearest first, of which neither is joined."""
    pairs = collect_pairs(run, forest, threshold)
    labels = np.arange(len(run.rows), dtype=run.rows.numbers.dtype)
    is_joined = np.zeros(len(labels), np.bool_)
    for a, b in zip(pairs.a.tolist(), pairs.b.tolist(), strict=True):
        if not is_joined[[a, b]].any():
            is_joined[[a, b]] = True
            labels[b] = a
    return Division(labels, None, threshold, partial(single_curve, run.rows, Edges.empty(), threshold)), forest


def test_what_a_linkage_does_and_says_is_in_its_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.unique(make_rows(60, num_centroids=12), axis=0)
    embeddings = write_embeddings(tmp_path / "rows", rows)
    single, _ = balance(tmp_path / "single", embeddings, threshold=0.6)
    module = ModuleType("twos")
    module.divide_by_twos = divide_by_twos  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "clipcid_cli.steps.balance.twos", module)
    entry = Linkage(
        help="two images at most are one set.",
        chooses=False,
        color=1,
        divided_by="twos:divide_by_twos",
        compared_with="single",
        compared_by="compared_linkage:compare_single",
        explanation="each image has at most one repeat.",
        why_fewer="Twos overlap at {:.6g}",
        which_join="Nearer pairs are joined first.",
    )
    explanation = LINKAGES["star"].explanation
    monkeypatch.setitem(LINKAGES, "star", entry)
    asked = {"threshold": 0.6, "linkage": "star", "select": "random"}
    result, _ = balance(tmp_path / "twos", embeddings, with_report=True, **asked)
    assert result["largest_component"] == 2 < single["largest_component"]
    assert result["other_linkage"] == {name: single[name] for name in ("kept", "uncovered_ratio")} | {
        "linkage": "single"
    }
    keep = read_keep(tmp_path / "twos")
    check_keep_list(keep, rows)
    assert (keep["representative"].astype(int) != keep["component"]).any()  # the central one of two is the first
    report = (tmp_path / "twos" / "balance" / "report.html").read_text()
    assert entry.explanation in report
    assert entry.which_join in report
    assert explanation not in report
    assert "chained most" not in report


def test_captions_without_a_usable_embedding_come_last_and_are_counted(tmp_path: Path) -> None:
    rows = np.repeat(make_rows(1), 5, axis=0)
    texts = np.stack([rows[0] * np.float16("nan"), rows[0] * 0, -rows[0], rows[0], rows[0]])
    captions = ["a", "b", "c", "d", ""]
    folder = write_embeddings(tmp_path / "e", rows[:3], 1, texts=texts[:3], captions=captions[:3])
    _, said = balance(tmp_path / "bad", folder, threshold=0.0, select="similarity")
    assert read_keep(tmp_path / "bad")["representative"].unique().tolist() == ["000002"]
    assert "2 text embeddings of images in sets are zero or not finite" in said
    assert "000000, 000001" in said
    folder = write_embeddings(tmp_path / "f", rows[2:], 1, texts=texts[2:], captions=captions[2:])
    _, said = balance(tmp_path / "good", folder, threshold=0.0, select="similarity")
    assert read_keep(tmp_path / "good")["representative"].unique().tolist() == ["000001"]
    assert "zero or not finite" not in said


def cover_in_order(pairs: Edges, copies: np.ndarray) -> np.ndarray:
    """Keep each row that no row before it covers, which represents all rows near it."""
    representatives = np.full(len(copies), -1)
    for row in range(len(copies)):
        if representatives[row] < 0:
            near = np.concatenate([pairs.b[pairs.a == row], pairs.a[pairs.b == row]])
            representatives[near[representatives[near] < 0]] = row
            representatives[row] = row
    return representatives


def test_another_cover_is_a_function_and_an_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.unique(make_rows(60, num_centroids=12), axis=0)
    module = ModuleType("in_order")
    module.cover_in_order = cover_in_order  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "clipcid_cli.algorithms.sets.in_order", module)
    entry = dataclasses.replace(LINKAGES["star"], covered_by="in_order:cover_in_order")
    monkeypatch.setitem(LINKAGES, "star", entry)
    result, _ = balance(tmp_path, write_embeddings(tmp_path / "rows", rows), keep=0.5, linkage="star")
    keep = read_keep(tmp_path)
    check_keep_list(keep, rows)
    assert result["kept"] <= round(0.5 * len(rows))
    assert (keep["representative"].astype(int) <= np.arange(len(rows))).all()  # stars have rows before their centre
