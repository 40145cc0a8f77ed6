"""Features first, gradients later: parts of a batch give the gradients of the whole, dropout included."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clipcid_cli.training.gradients import Features, GradCache

BATCH, PARTS = 8, 4
Part = tuple[Tensor, Tensor]


class Towers(nn.Module):
    """Two small towers with dropout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.visual = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 5))
        self.text = nn.Sequential(nn.Embedding(11, 12), nn.Flatten(), nn.Dropout(0.3), nn.Linear(24, 5))

    def forward(self, part: Part) -> Features:
        return Features(self.visual(part[0]), self.text(part[1]))


def loss_of(features: Features) -> Tensor:
    image, text = (nn.functional.normalize(rows, dim=1) for rows in (features.image, features.text))
    return nn.functional.cross_entropy(5 * image @ text.T, torch.arange(BATCH))


def test_parts_give_the_gradients_of_autograd_with_the_same_dropout_both_times() -> None:
    random, towers = torch.Generator().manual_seed(1), Towers().train()
    pixels, tokens = torch.randn(BATCH, 6, generator=random), torch.randint(0, 11, (BATCH, 2), generator=random)
    parts = list(zip(pixels.chunk(PARTS), tokens.chunk(PARTS), strict=True))
    encoded = []
    for seed, part in enumerate(parts):
        torch.manual_seed(seed)
        encoded.append(towers(part))
    whole = Features(torch.cat([part.image for part in encoded]), torch.cat([part.text for part in encoded]))
    loss_of(whole).backward()
    expected = [parameter.grad for parameter in towers.parameters()]

    towers.zero_grad()
    cache = GradCache(lambda number: towers(parts[number]), range(PARTS))
    loss_of(cache.features).backward()
    cache.backward(lambda: None)
    for parameter, wanted in zip(towers.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-4, atol=1e-6)
