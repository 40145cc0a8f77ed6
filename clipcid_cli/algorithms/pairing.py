"""Whether a teacher knows some data: how well its captions find their own images there, beside a guess.

Each caption ranks its own image among those of other captions; images that are paired with an equal caption are no wrong
answer, and count neither for nor against it. Equal images, which have equal rows, are one.

Shape letters: N pairs, C different captions, M different images.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clipcid_cli.records import Pairing

MAX_PAIRS = 2_000
"""Pairs that are enough for any data; ranking them costs the square of their number."""

# With fewer pairs, or fewer different captions, nothing can be told.
_MIN_PAIRS = 250
_MIN_CAPTIONS = 4

# A teacher that finds less than this times what a guess does is near chance.
_TIMES_CHANCE = 5
# Where a guess finds more than this among the first 10, as of fewer than 250 images, the first alone decides.
_MOST_BY_CHANCE = 0.04


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Image and text rows of pairs, unit rows, float32 [N, D]; captions are numbered, int64 [N], equal ones alike.

    Equal image rows are one image.
    """

    images_ND: Tensor
    texts_ND: Tensor
    captions_N: Tensor

    def __len__(self) -> int:
        return len(self.captions_N)

    def take(self, places: Tensor) -> Pairs:
        return Pairs(self.images_ND[places], self.texts_ND[places], self.captions_N[places])


def are_enough(pairs: Pairs) -> bool:
    """Tell whether something can be told by these pairs."""
    return len(pairs) >= _MIN_PAIRS and len(np.unique(pairs.captions_N)) >= _MIN_CAPTIONS


@dataclasses.dataclass(frozen=True)
class Matches:
    """The different captions and images of some pairs, numbered from 0."""

    caption_N: Tensor  # number of each pair's caption, int64
    image_N: Tensor  # number of each pair's image, int64
    first_C: Tensor  # a pair of each caption, int64
    first_M: Tensor  # a pair of each image, int64

    @classmethod
    def of(cls, images_ND: Tensor, captions_N: Tensor) -> Matches:
        """Match pairs, given their images' rows, float32, and numbers of their captions, equal ones alike."""
        first_C, caption_N = _number(captions_N.numpy())
        images = np.ascontiguousarray(images_ND.numpy())
        first_M, image_N = _number(images.view(f"V{images.strides[0]}")[:, 0])
        return cls(caption_N, image_N, first_C, first_M)

    def table(self) -> Tensor:
        """Tell which captions and images are pairs, bool [C, M]."""
        paired_CM = torch.zeros(len(self.first_C), len(self.first_M), dtype=torch.bool)
        paired_CM[self.caption_N, self.image_N] = True
        return paired_CM


def _number(values_N: npt.NDArray[np.generic]) -> tuple[Tensor, Tensor]:
    """Return the first place of each different value, and which of these each value is."""
    _, firsts, numbers = np.unique(values_N, return_index=True, return_inverse=True)
    return torch.from_numpy(firsts), torch.from_numpy(numbers)


def summarise_ranks(
    nearer_N: npt.NDArray[np.int64], others_N: npt.NDArray[np.int64], *, repaired: bool = False
) -> Pairing:
    """Summarise the ranks of captions' own images.

    Args:
        nearer_N: How many images of other captions come before a caption's own, int64 [N].
        others_N: How many images of other captions there are, int64 [N].
        repaired: Whether the images' rows were repaired.
    """
    recall_at_1, recall_at_10 = (float((nearer_N < k).mean()) for k in (1, 10))
    chance_at_1, chance_at_10 = (float(np.minimum(1, k / (1 + others_N)).mean()) for k in (1, 10))
    near_chance = recall_at_10 < _TIMES_CHANCE * chance_at_10
    if chance_at_10 > _MOST_BY_CHANCE:
        near_chance = recall_at_1 < _TIMES_CHANCE * chance_at_1
    return Pairing(
        pairs=len(nearer_N),
        candidates=round(1 + float(others_N.mean())),
        median_rank=1 + float(np.median(nearer_N)),
        chance_rank=1 + float(others_N.mean()) / 2,
        recall_at_1=recall_at_1,
        chance_at_1=chance_at_1,
        recall_at_10=recall_at_10,
        chance_at_10=chance_at_10,
        near_chance=near_chance,
        repaired=repaired,
    )


def rank_pairs(images_ND: Tensor, texts_ND: Tensor, captions_N: Tensor) -> Pairing:
    """Rank the images of pairs by their captions; equally near images come before a caption's own.

    Args:
        images_ND: Unit rows, float32, as the texts.
        captions_N: Number of each pair's caption, equal ones alike, int64.
    """
    matches = Matches.of(images_ND, captions_N)
    cosines_NM = texts_ND @ images_ND[matches.first_M].T
    own_N1 = cosines_NM.gather(1, matches.image_N[:, None])
    is_other_NM = ~matches.table()[matches.caption_N]
    nearer_NM = (cosines_NM >= own_N1) & is_other_NM
    return summarise_ranks(nearer_NM.sum(dim=1).numpy(), is_other_NM.sum(dim=1).numpy())
