"""Files of embeddings as they are written, shard by shard."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from clipcid_cli.formats.embeddings.pairing import list_files
from clipcid_cli.formats.embeddings.writer import EmbeddingWriter, ShardRecord, ShardRows
from clipcid_cli.formats.skips import Skips


def write(writer: EmbeddingWriter, number: int) -> None:
    record = ShardRecord(f"s{number}", 1, 1, Skips(), flattened=0)
    writer.write(number, record, [f"{number}"], [""], ShardRows(np.eye(1, 8, dtype=np.float16)))


def test_files_keep_their_names_when_there_are_more_shards_than_their_digits_can_count(tmp_path: Path) -> None:
    few = EmbeddingWriter(tmp_path, ["plan"] * 2)
    for number in range(2):
        write(few, number)
    written = few.describe()
    many = EmbeddingWriter(tmp_path, ["plan"] * 10_001)
    assert many.describe() == written
    assert many.read_record(1) == few.read_record(1)
    for number in (9_999, 10_000):
        write(many, number)
    found = list_files(tmp_path / "img_emb", ".npy")
    numbers = ["0000", "0001", "9999", "10000"]
    assert [path.name for path in found] == [f"img_emb_{number}.npy" for number in numbers]
