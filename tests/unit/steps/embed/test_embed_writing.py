"""`embed` writes a shard while it encodes the next; what goes wrong in writing ends the run, which can be repeated."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from teaching_data import embed_data

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.samples import Sample
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.formats.embeddings.manifest import read_manifest
from clipcid_cli.formats.embeddings.writer import EmbeddingWriter, ShardRows
from clipcid_cli.steps import encode
from clipcid_cli.steps.embed.cost import EmbedPace
from clipcid_cli.steps.embed.encoder import EmbedEncoder
from clipcid_cli.steps.embed.result import EmbedCost
from clipcid_cli.steps.encode import Decoded, Decoder

# Longer than a tiny model takes for a batch on any machine.
PATIENCE = 20.0


def content(folder: Path) -> dict[str, bytes]:
    """Read the files of rows and metadata."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.glob("*/*"))}


@pytest.fixture
def expected(tiny_shards: Path, tiny_model: Path, tmp_path: Path) -> dict[str, bytes]:
    embed_data(tiny_shards, tiny_model, tmp_path / "undisturbed")
    return content(tmp_path / "undisturbed")


def test_a_shard_is_written_while_the_next_is_encoded(
    expected: dict[str, bytes], tiny_shards: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, encode_batch = EmbeddingWriter.write, EmbedEncoder.__call__
    begun, encoded_since = threading.Event(), threading.Event()
    met = list[bool]()

    def write_slowly(writer: EmbeddingWriter, shard_index: int, rows: ShardRows) -> None:
        begun.set()
        if shard_index == 0:  # a run that does one thing after another never encodes before this returns
            met.append(encoded_since.wait(PATIENCE))
        write(writer, shard_index, rows)

    def encode_noted(encoder: EmbedEncoder, decoded: Decoded) -> dict[Kind, torch.Tensor]:
        if begun.is_set():
            encoded_since.set()
        return encode_batch(encoder, decoded)

    monkeypatch.setattr(encode, "threads_for_batches", lambda device: 1)  # several would be ahead by a few batches
    monkeypatch.setattr(EmbeddingWriter, "write", write_slowly)
    monkeypatch.setattr(EmbedEncoder, "__call__", encode_noted)
    out = tmp_path / "out"
    embed_data(tiny_shards, tiny_model, out)
    assert met == [True]
    assert content(out) == expected
    assert [record.input.shard for record in read_manifest(out, "")] == ["00000", "00001"]


@pytest.mark.parametrize("broken", [0, 1])
def test_what_goes_wrong_in_writing_ends_the_run(
    expected: dict[str, bytes],
    tiny_shards: Path,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    broken: int,
) -> None:
    write = EmbeddingWriter.write

    def fail(writer: EmbeddingWriter, shard_index: int, rows: ShardRows) -> None:
        if shard_index == broken:
            raise ClipcidError("No space is left.", "Free some.")
        write(writer, shard_index, rows)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(EmbeddingWriter, "write", fail)
        with pytest.raises(ClipcidError, match="No space is left"):
            embed_data(tiny_shards, tiny_model, out)
    assert not (out / "embed.json").exists()
    cost = embed_data(tiny_shards, tiny_model, out, dry_run=True)
    assert isinstance(cost, EmbedCost)
    assert (cost.shards, cost.shards_done) == (2 - broken, broken)
    assert (cost.images + cost.images_done, cost.bytes) == (24, cost.images * cost.bytes_per_image)
    embed_data(tiny_shards, tiny_model, out)
    assert content(out) == expected


def test_batches_that_were_decoded_before_do_not_hide_that_decoding_is_slow() -> None:
    pace = EmbedPace(batches=0.001, decoding=0.06)
    assert pace.of_run(15) == 0.004
    assert (pace.of_run(100), pace.of_run(0)) == (0.001, 0.001)
    assert (pace.is_bound_by_data(15), pace.is_bound_by_data(100)) == (True, False)


@pytest.mark.parametrize("slow", ["data", "model"])
def test_a_dry_run_times_decoding(
    slow: str, tiny_shards: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, encode_batch = Decoder.__call__, EmbedEncoder.__call__

    def decode_slowly(decoder: Decoder, samples: Sequence[Sample]) -> Decoded:
        time.sleep(0.02 * len(samples) * (slow == "data"))
        return decode(decoder, samples)

    def encode_slowly(encoder: EmbedEncoder, decoded: Decoded) -> dict[Kind, torch.Tensor]:
        time.sleep(0.1 * (slow == "model"))
        return encode_batch(encoder, decoded)

    monkeypatch.setattr(Decoder, "__call__", decode_slowly)
    monkeypatch.setattr(EmbedEncoder, "__call__", encode_slowly)
    cost = embed_data(tiny_shards, tiny_model, tmp_path / "rows", dry_run=True)
    assert isinstance(cost, EmbedCost)
    assert cost.bound_by == slow
    assert (cost.decoded_per_second < 50) == (slow == "data")
    assert not (tmp_path / "rows").exists()
