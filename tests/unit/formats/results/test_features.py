"""Kept features: read back as written, told apart by what decides them, made again when damaged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from clipcid_cli.formats.results.features import Features, features_path, read_features, write_features
from clipcid_cli.formats.skips import Skips


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    skips = Skips()
    skips.add("unreadable_image", "a/0")
    rows = torch.nn.functional.normalize(torch.randn(5, 8), dim=1)
    path = features_path(tmp_path, "tiny", {"weights": "abc"})
    assert path.name.startswith("tiny-")
    assert path != features_path(tmp_path, "tiny", {"weights": "abd"})
    assert read_features(path) is None
    write_features(path, Features(rows, torch.arange(5), skips))
    found = read_features(path)
    assert found is not None
    assert torch.equal(found.rows, rows)
    assert torch.equal(found.labels, torch.arange(5))
    assert found.skips == skips


@pytest.mark.parametrize("rows", [torch.zeros(3, 4), torch.eye(4)[:2], torch.full((3, 4), float("nan"))])
def test_rows_that_no_model_makes_and_damaged_files_are_none(tmp_path: Path, rows: torch.Tensor) -> None:
    path = tmp_path / "tiny-0.npz"
    write_features(path, Features(rows, torch.arange(3)))
    assert read_features(path) is None
    write_features(path, Features(torch.eye(3), torch.arange(3)))
    content = path.read_bytes()
    path.write_bytes(content[:200] + bytes([content[200] ^ 1]) + content[201:])
    assert read_features(path) is None
