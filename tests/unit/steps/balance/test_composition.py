"""The words of captions, before and after, against counting one caption at a time."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from clipcid_cli.steps.balance import report

VOCABULARY = (
    "Red",
    "red",
    "façade",
    "the",
    "of",
    "x",
    "boat",
    "boats",
    "don't",
    "2012",
    "Straße",
    "with",
    "лес",
    "ab1cd",
)


@pytest.mark.parametrize("at_once", [7, 333, 2**16])
def test_words_are_counted_once_an_image(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "_CAPTIONS_AT_ONCE", at_once)
    generator = np.random.default_rng(0)
    captions = [", ".join(generator.choice(VOCABULARY, generator.integers(0, 7))) for _ in range(500)]
    kept = generator.random(500) < 0.4
    found = report.count_words(pa.array(captions, pa.large_string()), kept)
    before: Counter[str] = Counter()
    after: Counter[str] = Counter()
    for caption, is_kept in zip(captions, kept, strict=True):
        words = {word for word in re.findall(r"[^\W\d_]+", caption.lower()) if len(word) >= 3} - {"the", "with"}
        before.update(words)
        after.update(words if is_kept else ())
    assert found["name"].tolist() == sorted(before) == ["boat", "boats", "don", "façade", "red", "straße", "лес"]
    assert found["before"].tolist() == [before[name] for name in found["name"]]
    assert found["after"].tolist() == [after[name] for name in found["name"]]
    nothing = report.count_words(pa.array(["", "of a"], pa.large_string()), np.array([True, False]))
    assert not len(nothing)


def test_the_largest_changes_of_shares_come_first() -> None:
    counts = pd.DataFrame({"name": list("abcde"), "before": [40, 20, 20, 10, 10], "after": [4, 16, 16, 4, 10]})
    risen, fallen = report._find_changes(counts, 100, 50)
    told = [tuple(each[name] for name in ("name", "before", "after", "share_before", "share_after")) for each in risen]
    assert told == [("b", 20, 16, 0.2, 0.32), ("c", 20, 16, 0.2, 0.32), ("e", 10, 10, 0.1, 0.2)]
    assert [each["name"] for each in fallen] == ["a", "d"]
