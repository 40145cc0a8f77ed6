"""Both towers over a batch, in parts: features first, their gradients later.

A contrastive loss needs the features of the whole batch at once, but not the towers' activations. So the losses are
computed on features detached from the towers, and the gradients of the features are propagated through the towers
afterwards. With several parts each part's activations live alone: all but the last part are encoded twice, first without
and then with what the backward pass needs. The result is that of one part, for any number of them.

Source: Gao et al. 2021 (GradCache, arXiv 2101.06983); open_clip's ``--accum-freq`` does the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Features(NamedTuple):
    """What the student makes of a batch or a part of it, not normalised.

    Attributes:
        image: [b, d].
        text: Of captions and of e texts without images, [b + e, d].
        masked_image: Of the images by a pass that saw few patches, [b, d].
        image_tokens: Of the images' patches, [b, P, d].
        text_tokens: Of the texts' tokens, [b + e, L, d], zeros after each text's last.
    """

    image: Tensor
    text: Tensor
    masked_image: Tensor | None = None
    image_tokens: Tensor | None = None
    text_tokens: Tensor | None = None


class GradCache:
    """One forward and one backward pass over a batch.

    Attributes:
        features: Those of all parts, detached from the towers; the losses' backward pass sets their gradients.
    """

    def __init__(self, encode: Callable[[int], Features], seeds: Sequence[int]) -> None:
        """Encode the batch.

        Args:
            encode: Encodes a part by its number.
            seeds: Seed of dropout and the like for each part.
        """
        self._encode_part, self._seeds = encode, seeds
        last = len(seeds) - 1
        with torch.no_grad():
            parts = [self._encode(number) for number in range(last)]
        self._last = self._encode(last)
        parts.append(self._last)
        self._sizes = [[0 if rows is None else len(rows) for rows in part] for part in parts]
        self.features = Features._make(_join(kind) for kind in zip(*parts, strict=True))

    def backward(self, before_last: Callable[[], None]) -> None:
        """Propagate the gradients of the features through the towers.

        Args:
            before_last: Called before the last part, after which every gradient is complete.
        """
        # For each kind of feature its gradients by part, and None for a kind that no loss reads.
        gradients = [
            None if rows is None or rows.grad is None else torch.split(rows.grad, list(sizes))
            for rows, sizes in zip(self.features, zip(*self._sizes, strict=True), strict=True)
        ]
        # The last part's activations exist already; freed first, they leave room for the others'.
        last = len(self._sizes) - 1
        for number in (last, *range(last)):
            if number == max(0, last - 1):
                before_last()
            part = self._last if number == last else self._encode(number)
            pairs = [
                (rows, gradient[number])
                for rows, gradient in zip(part, gradients, strict=True)
                if rows is not None and rows.requires_grad and gradient is not None
            ]
            if pairs:
                torch.autograd.backward([rows for rows, _ in pairs], [gradient for _, gradient in pairs])

    def _encode(self, number: int) -> Features:
        torch.manual_seed(self._seeds[number])  # nothing to save, nothing to restore
        return self._encode_part(number)


def _join(parts: tuple[Tensor | None, ...]) -> Tensor | None:
    rows = [part.detach() for part in parts if part is not None]
    return torch.cat(rows).requires_grad_() if rows else None
