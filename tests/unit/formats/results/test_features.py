"""Kept features: read back as written, told apart by what decides them, refused when damaged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.results.features import Features, features_path, read_features, write_features
from clipcid_cli.formats.skips import Skips


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    skips = Skips()
    skips.add("unreadable_image", "a/0")
    rows = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
    path = features_path(tmp_path, "tiny", {"weights": "abc"})
    assert read_features(path) is None
    write_features(path, Features(rows, np.arange(5), skips))
    found = read_features(path)
    assert found is not None
    np.testing.assert_array_equal(found.rows, rows)
    np.testing.assert_array_equal(found.labels, np.arange(5))
    assert found.skips == skips


def test_other_weights_or_data_have_another_name(tmp_path: Path) -> None:
    names = {
        features_path(tmp_path, "tiny", {"weights": weights, "data": data})
        for weights in "ab"
        for data in ([1], [1, 2])
    }
    assert len(names) == 4
    assert all(path.name.startswith("tiny-") for path in names)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "tiny-0.npz"
    path.write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(ClipcidError, match=r"tiny-0\.npz cannot be read"):
        read_features(path)
