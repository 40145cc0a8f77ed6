"""The report of `balance`: what moved, which sets are chains, and the words of captions, against plain counts."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from balance_data import balance, make_rows, write_embeddings
from PIL import Image

from clipcid_cli.steps.balance import report

VOCABULARY = [
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
]


def test_it_tells_what_moved_and_loads_nothing(tmp_path: Path) -> None:
    """Three images of class `ant` are one picture, one of them is kept; `bee` and `cat` keep both of theirs."""
    sizes = {"ant": 3, "bee": 2, "cat": 2}
    keys = [f"{name}/{number}" for name, count in sizes.items() for number in range(count)]
    for number, key in enumerate(keys):
        (tmp_path / "photos" / key).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (30 * number, 90, 120)).save(tmp_path / "photos" / f"{key}.png")
    rows = np.unique(make_rows(300), axis=0)[[0, 0, 0, 1, 2, 3, 4]]
    captions = [f"A {key[:3].upper()}, the" for key in keys]
    folder = write_embeddings(tmp_path / "e", rows, keys=keys, captions=captions)
    reports = {}
    for name, data in (("classes", str(tmp_path / "photos")), ("words", None)):
        balance(tmp_path / name, folder, threshold=0.0, data=data)
        page = reports[name] = (tmp_path / name / "balance" / "report.html").read_text()
        assert "Changes in composition</h2>" in page
        risen, fallen = page.split("Largest decreases")
        assert [risen.count(f'class="name">{word}<') for word in ("bee", "cat", "ant")] == [1, 1, 0]
        assert 'class="name">ant<' in fallen
        assert "42.86 → 20.00 %<br><small>3 → 1</small>" in fallen
        assert not re.findall(r"""(?:src|href)=["'](?!data:|#)|url\((?!#)|@import|<link|<script""", page)
    assert "each of 3 classes, among the 7 images and the 5 kept ones" in reports["classes"]
    assert "whose caption has the word" in reports["words"]
    assert reports["classes"].count("data:image/webp") == 3 + 2 * 2  # the set, and the pairs that join it
    assert "not shown: it is not recorded which data" in " ".join(reports["words"].split())


@pytest.mark.parametrize("at_once", [7, 2**16])
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
