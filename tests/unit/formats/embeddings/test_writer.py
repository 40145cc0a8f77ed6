"""Files of embeddings as they are named, shard by shard."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.formats.embeddings.manifest import EmbeddingWriter, ShardRows
from clipcid_cli.formats.fingerprint import FileRecord
from clipcid_cli.formats.skips import Skips


@pytest.mark.parametrize(("shards", "number"), [(1, "0000"), (10_000, "0000"), (10_001, "00000")])
def test_numbers_have_at_least_four_digits(tmp_path: Path, shards: int, number: str) -> None:
    inputs = [FileRecord(f"{shard}.tar", 1, "blake2b:00", shard=str(shard)) for shard in range(shards)]
    rows = {Kind.IMAGES: np.zeros((1, 4), np.float16)}
    EmbeddingWriter(tmp_path, {}, inputs).write(0, ShardRows(1, Skips(), 0, ["a"], [""], None, rows))
    assert (tmp_path / f"img_emb/img_emb_{number}.npy").is_file()
    assert (tmp_path / f"metadata/metadata_{number}.parquet").is_file()
