"""The columns of matched samples: written shard by shard, mapped as one, whole or not there."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from clipcid_cli.formats.results.matched_samples import TRAINING, matched_folder, open_rows, writing_rows


@pytest.mark.parametrize(("limit", "dtype"), [(2**31 - 1, np.int32), (2**31, np.int64)])
def test_columns_are_as_wide_as_they_must_be(limit: int, dtype: type, tmp_path: Path) -> None:
    with writing_rows(tmp_path, TRAINING, {"places": 100, "embeddings": limit}) as append:
        for first, size in ((0, 3), (10, 0), (40, 2)):
            numbers = np.arange(first, first + size)
            append({"places": numbers, "embeddings": limit - 1 - numbers, "clusters": numbers})
    rows = open_rows(tmp_path, TRAINING)
    assert rows.sizes.tolist() == [3, 0, 2]
    assert rows.total == 5
    assert rows.column("places").dtype == np.int32
    assert rows.column("places").tolist() == [0, 1, 2, 40, 41]
    assert rows.column("embeddings").dtype == dtype
    assert (limit - 1 - rows.column("embeddings").astype(np.int64)).tolist() == [0, 1, 2, 40, 41]
    assert not (tmp_path / "training.clusters.npy").exists(), "a column that was not begun is not written"
    assert isinstance(rows.column("places"), np.memmap)
    sent = pickle.dumps(rows)
    assert len(sent) < 1_000
    assert pickle.loads(sent).column("places").tolist() == [0, 1, 2, 40, 41]
    assert matched_folder(tmp_path, {"val_fraction": 0.1}) != matched_folder(tmp_path, {"val_fraction": 0.2})
