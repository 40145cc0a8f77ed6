"""How many samples a batch has, and what a worker keeps between batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from clipcid_cli.errors import ClipcidError
from clipcid_cli.runtime.distributed import DistContext
from clipcid_cli.steps.distill.run import choose_batch_size
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
