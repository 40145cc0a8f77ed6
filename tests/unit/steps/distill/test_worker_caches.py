"""What a worker keeps between batches: nothing, where it would not be seen again."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, patch

import pytest
from conftest import make_image
from PIL import Image
from teaching_data import ALONE, embed_data, join

from clipcid_cli.runtime.models import decode
from clipcid_cli.runtime.models.augment import Processor
from clipcid_cli.runtime.models.clip_model import load_model
from clipcid_cli.runtime.models.decode import ImageCache
from clipcid_cli.runtime.models.names import parse_model
from clipcid_cli.steps.distill import batches
from clipcid_cli.steps.distill.batches import Batches, BatchMaker, DealtBatch, TrainingBatch


def test_workers_keep_images_and_tokens_of_small_data_alone(
    tmp_path: Path, tiny_shards: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed_data(tiny_shards, tiny_model, tmp_path / "tiny")
    run, model = join(tiny_shards, tmp_path / "tiny"), load_model(parse_model(str(tiny_model)))
    for most, kept in ((24, 1), (5, 2)):
        monkeypatch.setattr(batches, "_MAX_SAMPLES_KEPT", most)
        tokenizer = Mock(wraps=model.tokenizer)
        maker = BatchMaker(run.settings, run.inputs, dataclasses.replace(Processor.of(model), tokenizer=tokenizer))
        with patch.object(decode, "read_image", wraps=decode.read_image) as read:
            for dealt in Batches(run.inputs, maker, None, 24, 3, ALONE).deal(range(2)):
                maker(*dealt.work)
        assert read.call_count == 24 * kept
        assert tokenizer.call_count == kept


def test_kept_tokens_are_the_tokenizers(tiny_model: Path) -> None:
    tokenizer = load_model(parse_model(str(tiny_model))).tokenizer
    for max_texts in (0, 100):
        tokens = batches._TokenCache(tokenizer, max_texts)
        for texts in (["a cat", "a dog", "a cat"], ["a sky", "a dog"]):
            assert tokens(texts).equal(tokenizer(texts))


def test_a_cache_without_room_gives_the_same_and_keeps_nothing() -> None:
    source: Any = SimpleNamespace(read=lambda: make_image(1))
    roomy, without = ImageCache(2**20), ImageCache(0)
    first, again = roomy.read("1", source), roomy.read("1", source)
    fresh = without.read("1", source)
    assert first is again
    assert isinstance(first, Image.Image)
    assert isinstance(fresh, Image.Image)
    assert first.tobytes() == fresh.tobytes()
    assert without.read("1", source) is not fresh


def test_the_parts_of_a_large_batch_hold_no_files_open(
    tmp_path: Path, tiny_shards: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed_data(tiny_shards, tiny_model, tmp_path / "tiny")
    run, model = join(tiny_shards, tmp_path / "tiny"), load_model(parse_model(str(tiny_model)))
    monkeypatch.setattr(batches, "_MAX_ITEMS", 1)
    opened = list[int]()

    def count_open() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    class Counted(Batches):
        def finish(self, dealt: DealtBatch, parts: Sequence[TrainingBatch]) -> TrainingBatch:
            opened.append(count_open())
            return super().finish(dealt, parts)

    loaded = Counted(run.inputs, BatchMaker(run.settings, run.inputs, Processor.of(model)), None, 24, 3, ALONE)
    before = count_open()
    with closing(loaded.load(range(2), 1)) as made:
        assert len(next(made)) == 24
    # A batch of 24 parts has four tensors each; the results of the few items that are on their way may be open.
    assert opened[0] - before < 48
