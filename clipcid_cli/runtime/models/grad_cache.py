"""Both towers over a batch, in parts: features first, their gradients later.

A contrastive loss needs the features of the whole batch at once, the towers' activations it does not. So the losses are
computed on features cut off from the towers, and the gradients they leave on the features are carried through the towers
afterwards. With several parts each part's activations live alone: all but the last part are encoded twice, first without
and then with what the backward pass needs. The result is that of one part, for any number of them.

Source: Gao et al. 2021 (GradCache, arXiv 2101.06983); open_clip's ``--accum-freq`` does the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clipcid_cli.errors import ClipcidError

# Runs both towers on normalised pixels (on the model's device) and tokens (on the CPU): features [b, d], not normalised.
EncodeBoth = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class BatchPart:
    """What one part of a batch is made of.

    Attributes:
        pixels: As the worker made them, [b, H, W, 3].
        colors: Colour maps, [b, 3, 4].
        tokens: int64 [b, L].
        seed: Seed of dropout and the like, the same both times the part is encoded.
    """

    pixels: Tensor
    colors: Tensor
    tokens: Tensor
    seed: int


# Runs both towers on a part: image and text features, not normalised, [b, d] each.
Encode = Callable[[BatchPart], tuple[Tensor, Tensor]]


class GradCache:
    """One forward and one backward pass over a batch.

    Attributes:
        image: Image features of all parts, [b, d], cut off from the tower; losses leave their gradient on it.
    """

    def __init__(self, encode: Encode, parts: Sequence[BatchPart]) -> None:
        """Encode the batch.

        Args:
            encode: Runs both towers on a part.
            parts: The batch in parts, in order.
        """
        self._encode, self._parts = encode, parts
        with torch.no_grad():
            found = [self._run(part) for part in parts[:-1]]
        self._last = self._run(parts[-1])
        found.append(self._last)
        self.image, self.text = (
            torch.cat([side.detach() for side in sides]).requires_grad_() for sides in zip(*found, strict=True)
        )

    def backward(self, before_last: Callable[[], None]) -> None:
        """Carry the gradients of the features through the towers.

        Args:
            before_last: Called before the last part, after which every gradient is whole.
        """
        gradients = self._split(self.image.grad), self._split(self.text.grad)
        # The last part's activations are there already; freed first, they leave room for the others'.
        last = len(self._parts) - 1
        for number in (last, *range(last)):
            if number == max(0, last - 1):
                before_last()
            features = self._last if number == last else self._run(self._parts[number])
            pairs = [
                (side, gradient[number])
                for side, gradient in zip(features, gradients, strict=True)
                if side.requires_grad and gradient is not None
            ]
            if pairs:
                torch.autograd.backward([side for side, _ in pairs], [gradient for _, gradient in pairs])

    def _run(self, part: BatchPart) -> tuple[Tensor, Tensor]:
        # Dropout and the like draw from a seed of their own: nothing to save, nothing to restore.
        torch.manual_seed(part.seed)
        return self._encode(part)

    def _split(self, gradient: Tensor | None) -> list[Tensor] | None:
        sizes = [len(part.tokens) for part in self._parts]
        return None if gradient is None else list(torch.split(gradient, sizes))


def compile_towers(module: Any) -> EncodeBoth:
    """Compile a model's passes of both towers with torch.compile, when they are first called.

    Raises:
        ClipcidError: by what is returned, where the compiler fails: on a CPU it needs a C++ compiler.
    """

    def encode(pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return module.encode_image(pixels), module.encode_text(tokens)

    fast = torch.compile(encode)

    def call(pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        try:
            return fast(pixels, tokens.to(pixels.device, non_blocking=True))
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = " ".join(str(error).split())
            raise ClipcidError(
                f"--torchcompile: torch.compile failed: {reason[:400]}{'…' if len(reason) > 400 else ''}",
                "Leave --torchcompile away; on a CPU it needs a C++ compiler (g++).",
            ) from error

    return call
