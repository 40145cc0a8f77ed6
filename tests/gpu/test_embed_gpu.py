"""Embedding on a GPU agrees with the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import Clipcid

from clipcid_cli.formats.embeddings.folder import open_embeddings
from clipcid_cli.formats.embeddings.rows import Kind

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_rows_agree_with_the_cpu(
    precision: str, clipcid: Clipcid, tiny_shards: Path, tiny_model: Path, tmp_path: Path
) -> None:
    command = ["embed", tiny_shards, "--model", tiny_model, "--out"]
    clipcid(*command, tmp_path / "cpu", "--device", "cpu", "--precision", "fp32")
    clipcid(*command, tmp_path / "gpu", "--device", "cuda", "--precision", precision)
    cpu, gpu = open_embeddings(tmp_path / "cpu"), open_embeddings(tmp_path / "gpu")
    for there, here in ((cpu.rows(Kind.IMAGES), gpu.rows(Kind.IMAGES)), (cpu.rows(Kind.TEXTS), gpu.rows(Kind.TEXTS))):
        a, b = (rows.read(0, 24).astype(np.float64) for rows in (there, here))
        cosine = (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        assert cosine.min() > (0.99999 if precision == "fp32" else 0.999)
