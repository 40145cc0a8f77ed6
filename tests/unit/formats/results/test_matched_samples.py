"""The columns of matched samples: as wide as they must be, mapped, and sent without their content."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from clipcid_cli.formats.results.matched_samples import TRAINING, open_rows, writing_rows


@pytest.mark.parametrize(("limit", "dtype"), [(2**31 - 1, np.int32), (2**31, np.int64)])
def test_columns_are_as_wide_as_they_must_be(limit: int, dtype: type, tmp_path: Path) -> None:
    with writing_rows(tmp_path, TRAINING, {"places": limit}) as append:
        for numbers in (np.arange(100_000), np.arange(0), np.array([limit - 1])):
            append({"places": numbers})
    sent = pickle.dumps(open_rows(tmp_path, TRAINING))
    assert len(sent) < 1_000
    column = pickle.loads(sent).column("places")
    assert isinstance(column, np.memmap)
    assert column.dtype == dtype
    assert column.tolist() == [*range(100_000), limit - 1]
