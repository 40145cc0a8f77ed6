"""How many samples a batch has, and what a worker keeps between batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
from teaching_data import ALONE, Run, embed_data, join

from clipcid_cli.errors import ClipcidError
from clipcid_cli.runtime.distributed import DistContext
from clipcid_cli.runtime.models import decode
from clipcid_cli.runtime.models.augment import Processor
from clipcid_cli.runtime.models.clip_model import ClipModel, load_model
from clipcid_cli.runtime.models.names import parse_model
from clipcid_cli.steps.distill import batches
from clipcid_cli.steps.distill.batches import Batches, BatchMaker, DealtBatch, TrainingBatch
from clipcid_cli.steps.distill.plan import choose_batch_size
from clipcid_cli.steps.settings.distill import DistillSettings


@pytest.mark.parametrize(
    ("device", "gpus", "samples", "settings", "expected"),
    [
        ("cpu", 1, 400_000_000, {}, 256),
        ("cpu", 1, 100, {}, 100),
        ("cpu", 3, 100, {"accum_freq": 2}, 96),
        ("cuda", 8, 400_000_000, {}, 4096),
        ("cuda", 1, 400_000_000, {}, 512),
        ("cuda", 8, 400_000_000, {"steps": 1000}, 2048),
        ("cuda", 8, 640_000, {}, 1024),  # 32 epochs are 20,000 steps of 1,024
        ("cuda", 8, 639_999, {}, 512),
        ("cuda", 8, 640_000, {"epochs": 16}, 512),
        ("cuda", 6, 400_000_000, {}, 2046),  # as many for each process
    ],
)
def test_batches_grow_with_the_data_where_there_are_gpus(
    device: str, gpus: int, samples: int, settings: dict[str, Any], expected: int
) -> None:
    context = DistContext(0, gpus, 0, torch.device(device))
    assert choose_batch_size(DistillSettings(student="ViT-B-32", **settings), samples, context) == expected


@pytest.mark.parametrize(
    ("processes", "samples", "settings", "fix"),
    [
        (1, 3, {"batch_size": 8}, "Lower --batch-size, or give more data."),
        (4, 3, {}, "Use fewer processes or a lower --accum-freq, or give more data."),
        (1, 0, {}, "Give more data."),
    ],
)
def test_too_few_samples_for_a_batch_are_refused_with_what_can_help(
    processes: int, samples: int, settings: dict[str, Any], fix: str
) -> None:
    context = DistContext(0, processes, 0, torch.device("cpu"))
    with pytest.raises(ClipcidError, match="fewer than one batch") as refused:
        choose_batch_size(DistillSettings(student="ViT-B-32", **settings), samples, context)
    assert refused.value.fix == fix


@pytest.fixture
def run(tiny_shards: Path, tiny_model: Path, tmp_path: Path) -> Run:
    embed_data(tiny_shards, tiny_model, tmp_path / "tiny")
    return join(tiny_shards, tmp_path / "tiny")


@pytest.fixture
def model(tiny_model: Path) -> ClipModel:
    return load_model(parse_model(str(tiny_model)))


def test_workers_keep_images_and_tokens_of_small_data_alone(
    run: Run, model: ClipModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    for most, times in ((24, 1), (5, 2)):
        monkeypatch.setattr(batches, "_MAX_SAMPLES_KEPT", most)
        tokenizer = Mock(wraps=model.tokenizer)
        maker = BatchMaker(run.settings, run.inputs, dataclasses.replace(Processor.of(model), tokenizer=tokenizer))
        with patch.object(decode, "read_image", wraps=decode.read_image) as read:
            for dealt in Batches(run.inputs, maker, None, 24, 3, ALONE).deal(range(2)):
                made.append(maker(*dealt.work))
        assert read.call_count == 24 * times
        assert tokenizer.call_count == times
    for kept, fresh in zip(made[:2], made[2:], strict=True):
        assert torch.equal(kept.pixels, fresh.pixels)
        assert torch.equal(kept.tokens, fresh.tokens)


def test_the_parts_of_a_large_batch_hold_no_files_open(
    run: Run, model: ClipModel, monkeypatch: pytest.MonkeyPatch
) -> None:
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
