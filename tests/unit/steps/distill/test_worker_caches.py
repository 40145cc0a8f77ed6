"""What a worker keeps between batches: nothing, where it would not be seen again."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import make_image
from PIL import Image
from teaching_data import train, write_student

from clipcid_cli.runtime.models.caches import ImageCache, TokenCache
from clipcid_cli.runtime.models.clip_model import load_model
from clipcid_cli.runtime.models.names import parse_model
from clipcid_cli.steps.distill import training_run
from clipcid_cli.steps.distill.batches import BatchMaker


def test_workers_keep_images_and_tokens_of_small_data_alone(
    tmp_path: Path, tiny_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    makers: list[BatchMaker] = []

    def make(*given: Any, **named: Any) -> BatchMaker:
        makers.append(BatchMaker(*given, **named))
        return makers[-1]

    monkeypatch.setattr(training_run, "BatchMaker", make)
    student = str(write_student(tmp_path))
    for most in (24, 5):
        monkeypatch.setattr(training_run, "MAX_CAPTIONS", most)
        train(tmp_path / f"{most}", tiny_shards, preset="clip", student=student, steps=1)
    assert [len(maker._images._images) > 0 for maker in makers] == [True, False]
    assert [maker._tokens._most > 0 for maker in makers] == [True, False]


def test_caches_without_room_give_the_same_and_keep_nothing(tiny_model: Path) -> None:
    source: Any = SimpleNamespace(read=lambda: make_image(1))
    roomy, without = ImageCache(2**20), ImageCache(0)
    first, again = roomy.read("1", source), roomy.read("1", source)
    fresh = without.read("1", source)
    assert first is again
    assert isinstance(first, Image.Image)
    assert isinstance(fresh, Image.Image)
    assert first.tobytes() == fresh.tobytes()
    assert without.read("1", source) is not fresh
    tokenizer = load_model(parse_model(str(tiny_model))).tokenizer
    tokens = TokenCache(tokenizer, 0)
    for captions in (["a cat", "a dog", "a cat"], ["a sky"]):
        assert tokens(captions).equal(tokenizer(captions))
        assert len(tokens._tokens) == len(set(captions))
