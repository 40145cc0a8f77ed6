"""The captions that the report compares: split some at a time, whatever the shards."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from balance_data import make_rows, write_embeddings

from clipcid_cli.formats.embeddings.folder import open_embeddings
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.steps.balance import composition
from clipcid_cli.steps.balance.rows import find_rows
from clipcid_cli.steps.reporting import Reporter


@pytest.mark.parametrize(
    ("at_once", "num_files", "step"), [(7, 2, 1), (7, 60, 1), (1000, 60, 1), (1, 9, 3), (50, 1, 4)]
)
def test_each_caption_is_split_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int, num_files: int, step: int
) -> None:
    monkeypatch.setattr(composition, "_CAPTIONS_AT_ONCE", at_once)
    captions = [f"picture {chr(97 + row % 26)}{chr(97 + row // 26)}" if row % 5 else "" for row in range(50)]
    folder = write_embeddings(tmp_path / "rows", make_rows(50, width=8), num_files, captions=captions)
    embeddings = open_embeddings(folder)
    rows = find_rows(Machine(0, 1, 0, torch.device("cpu")), tmp_path, embeddings.rows(Kind.IMAGES), Reporter())
    kept = np.arange(50) % 3 > 0
    found, seen = Counter[str](), list[bool]()
    for part in composition._split_captions(embeddings, rows, kept, step):
        assert len(part.has_caption) == len(part.kept) < 2 * at_once
        found.update(part.words[word] for word in part.word.tolist() if part.words[word])
        assert [bool(each) for each in part.has_caption] == [
            bool(caption) for caption in captions[::step][len(seen) : len(seen) + len(part.kept)]
        ]
        seen.extend(part.kept.tolist())
    assert seen == kept[::step].tolist()
    assert found == Counter(word for caption in captions[::step] for word in caption.split())
