"""Where the pairs come from by which a teacher is judged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from balance_data import heard, unit, write_embeddings

from clipcid_cli.formats.embeddings.folder import open_embeddings
from clipcid_cli.records import Repair
from clipcid_cli.steps.pairing import consider_rows, judge_pairing
from clipcid_cli.steps.repair import describe_repair, repair_teacher
from clipcid_cli.steps.settings.cluster import ClusterSettings


def test_all_rows_are_considered_where_they_are_few() -> None:
    np.testing.assert_array_equal(consider_rows(40_000), np.arange(40_000))


@pytest.mark.parametrize("num_rows", [40_001, 50_017, 10**6, 407_000_000])
def test_rows_are_considered_everywhere_in_stretches(num_rows: int) -> None:
    rows = consider_rows(num_rows)
    steps = np.diff(rows)
    assert len(rows) == 40_000
    assert rows[0] >= 0
    assert rows[-1] < num_rows
    assert steps.min() > 0, "ascending, each row once"
    assert (steps > 1).sum() < 40, "a disk reads stretches"
    assert np.histogram(rows, 40, (0, num_rows))[0].tolist() == pytest.approx([1000] * 40, abs=1)


def test_pairs_are_of_all_files(tmp_path: Path) -> None:
    """Of two large files one pairs rightly, the other not at all."""
    random = np.random.default_rng(0)
    num_rows = 82_000
    texts = unit(random.normal(size=(num_rows, 16))).astype(np.float16)
    images = texts.copy()
    images[num_rows // 2 :] = np.roll(texts[num_rows // 2 :], 7, axis=0)
    captions = [f"caption {row}" for row in range(num_rows)]
    embeddings = open_embeddings(write_embeddings(tmp_path / "rows", images, 2, texts=texts, captions=captions))
    pairing = judge_pairing(embeddings)
    assert pairing is not None
    assert pairing.pairs == 2_000
    assert pairing.recall_at_1 == pytest.approx(0.5, abs=0.05)


def test_pairs_of_one_image_decide_no_repair_but_are_ranked(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    texts = unit(random.normal(size=(300, 16))).astype(np.float16)
    images = texts[:1].repeat(300, axis=0)
    captions = [f"caption {row}" for row in range(300)]
    embeddings = open_embeddings(write_embeddings(tmp_path / "rows", images, texts=texts, captions=captions))
    with heard() as said:
        assert repair_teacher(ClusterSettings(work=tmp_path / "work"), embeddings) == (embeddings, None)
    assert "too few pairs, or different captions or images, to judge a repair by" in str(said)
    pairing = judge_pairing(embeddings)
    assert pairing is not None
    assert pairing.near_chance


@pytest.mark.parametrize(
    ("log_rank", "error", "gain"),
    [
        ((0.5, 0.4), 0.02, "too small a gain from a repair (to 65.0%, rank 1.65 → 1.49)"),
        ((0.5, 0.4), 0.05, "no clear gain from a repair"),
        ((0.5, 0.5), 0.0, "no clear gain from a repair"),
    ],
)
def test_why_a_teacher_is_left_as_it_is(log_rank: tuple[float, float], error: float, gain: str) -> None:
    figures = Repair(
        repaired=False,
        steps=5,
        log_rank=log_rank,
        standard_error=error,
        recall_at_1=(0.6, 0.65),
        chance_at_1=0.05,
        pairs=500,
        captions=100,
    )
    assert describe_repair(figures) == f"Teacher left as it is: held-out R@1 60.0% (a guess: 5.0%), and {gain}."
