"""Features first, gradients later: any number of parts gives the gradients of one pass, dropout included."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from clipcid_cli.training.gradients import Features, GradCache

BATCH = 8


class Part(NamedTuple):
    """A part of a batch; what masks it hides some of the 6 numbers that stand for an image."""

    pixels: Tensor
    tokens: Tensor
    kept: Tensor | None


class Towers(nn.Module):
    """Two small towers with dropout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.visual = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 5))
        self.text = nn.Sequential(nn.Embedding(11, 12), nn.Flatten(), nn.Dropout(0.3), nn.Linear(24, 5))

    def forward(self, part: Part) -> Features:
        masked = None if part.kept is None else self.visual(part.pixels * part.kept)
        return Features(self.visual(part.pixels), self.text(part.tokens), masked)


def parts_of(count: int, *, masked: bool = False) -> list[Part]:
    """Cut a batch into parts."""
    random = torch.Generator().manual_seed(1)
    pixels, tokens = torch.randn(BATCH, 6, generator=random), torch.randint(0, 11, (BATCH, 2), generator=random)
    kept = torch.randint(0, 2, (BATCH, 6), generator=random)
    cut = zip(pixels.chunk(count), tokens.chunk(count), kept.chunk(count), strict=True)
    return [Part(p, t, k if masked else None) for p, t, k in cut]


def encode(towers: Towers, parts: list[Part]) -> GradCache:
    return GradCache(lambda number: towers(parts[number]), range(len(parts)))


def loss_of(features: Features) -> Tensor:
    image, text, *masked = (nn.functional.normalize(rows, dim=1) for rows in features if rows is not None)
    loss = nn.functional.cross_entropy(5 * image @ text.T, torch.arange(BATCH))
    return loss + sum((rows - text.roll(1, 1)).square().sum() for rows in masked)


def gradients(towers: Towers, parts: list[Part]) -> list[Tensor]:
    done = encode(towers, parts)
    loss_of(done.features).backward()  # type: ignore[no-untyped-call]
    done.backward(lambda: None)
    return [torch.zeros(()) if p.grad is None else p.grad.clone() for p in towers.parameters()]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("count", [1, 4])
def test_parts_give_the_gradients_of_autograd(count: int, masked: bool) -> None:
    towers = Towers().eval()
    loss_of(towers(parts_of(1, masked=masked)[0])).backward()  # type: ignore[no-untyped-call]
    expected = [p.grad.clone() for p in towers.parameters() if p.grad is not None]
    towers.zero_grad()
    for found, wanted in zip(gradients(towers, parts_of(count, masked=masked)), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_dropout_is_the_same_both_times_a_part_is_encoded() -> None:
    towers = Towers().train()
    parts = parts_of(4)
    found = []
    for seed, part in enumerate(parts):
        torch.manual_seed(seed)
        found.append(towers(part))
    whole = Features(*(torch.cat(side) for side in zip(*((part.image, part.text) for part in found), strict=True)))
    loss_of(whole).backward()  # type: ignore[no-untyped-call]
    expected = [p.grad.clone() for p in towers.parameters() if p.grad is not None]
    towers.zero_grad()
    for found, wanted in zip(gradients(towers, parts), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
