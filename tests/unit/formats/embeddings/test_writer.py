"""Files of embeddings as they are named, shard by shard."""

from __future__ import annotations

import pytest

from clipcid_cli.formats.embeddings.kinds import METADATA, Kind, count_digits, file_name


@pytest.mark.parametrize(("shards", "digits"), [(1, 4), (10_000, 4), (10_001, 5)])
def test_numbers_have_at_least_four_digits(shards: int, digits: int) -> None:
    assert count_digits(shards) == digits
    assert file_name(Kind.IMAGES, 12, digits) == f"img_emb/img_emb_{12:0{digits}d}.npy"
    assert file_name(METADATA, 0, 4) == "metadata/metadata_0000.parquet"
