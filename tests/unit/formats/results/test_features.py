"""Kept features that are damaged, or that no model makes, are made again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from clipcid_cli.formats.results.features import Features, read_features, write_features


@pytest.mark.parametrize("rows", [torch.zeros(3, 4), torch.eye(4)[:2], torch.full((3, 4), float("nan"))])
def test_rows_that_no_model_makes_and_damaged_files_are_none(tmp_path: Path, rows: torch.Tensor) -> None:
    path = tmp_path / "tiny-0.npz"
    write_features(path, Features(rows, torch.arange(3)))
    assert read_features(path) is None
    write_features(path, Features(torch.eye(3), torch.arange(3)))
    content = path.read_bytes()
    path.write_bytes(content[:200] + bytes([content[200] ^ 1]) + content[201:])
    assert read_features(path) is None
