"""Both towers over a batch, in parts: features first, their gradients later.

A contrastive loss needs the features of the whole batch at once, but not the towers' activations. So the losses are
computed on features detached from the towers, and the gradients of the features are propagated through the towers
afterwards. With several parts each part's activations live alone: all but the last part are encoded twice, first without
and then with what the backward pass needs. The result is that of one part, for any number of them.

Source: Gao et al. 2021 (GradCache, arXiv 2101.06983); open_clip's ``--accum-freq`` does the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from clipcid_cli.errors import ClipcidError
from clipcid_cli.runtime.models.augment import apply_colors
from clipcid_cli.runtime.models.clip_model import ClipModel
from clipcid_cli.runtime.models.preprocess import normalize_pixels
from clipcid_cli.runtime.models.pruned_forward import PrunedForward
from clipcid_cli.runtime.precision import Precision, fast_attention

# Runs both towers on normalised pixels (on the model's device) and tokens (on the CPU): features [b, d], not normalised.
EncodeBoth = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class BatchPart:
    """A part of a batch.

    Attributes:
        pixels: As a worker made them, [b, H, W, 3].
        colors: Colour maps, [b, 3, 4].
        tokens: int64 [b, L]; more texts than images where some have none.
        seed: Seed of dropout and the like, the same both times the part is encoded.
        kept_patches: Patches of each image that a further pass sees, int64 [b, n]; None without that pass.
    """

    pixels: Tensor
    colors: Tensor
    tokens: Tensor
    seed: int
    kept_patches: Tensor | None = None


@dataclass(frozen=True)
class Features:
    """What the student makes of a batch or a part of it, not normalised.

    Attributes:
        image: Of the images, [b, d].
        text: Of the captions, [b, d]; [b + e, d] with e texts without images.
        masked_image: Of the images by a pass that saw few patches, [b, d]; None without that pass.
        image_tokens: Of the images' patches, [b, P, d]; None where no loss reads them.
        text_tokens: Of the captions' tokens, [b, L, d], zeros after each caption's last; None likewise.
    """

    image: Tensor
    text: Tensor
    masked_image: Tensor | None = None
    image_tokens: Tensor | None = None
    text_tokens: Tensor | None = None

    def by_name(self) -> dict[str, Tensor]:
        """Return those that there are."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: rows for name, rows in found.items() if rows is not None}


# Runs both towers on a part.
Encode = Callable[[BatchPart], Features]


class GradCache:
    """One forward and one backward pass over a batch.

    Attributes:
        features: Those of all parts, detached from the towers; the losses' backward pass sets their gradients.
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
        sides = [part.by_name() for part in found]
        self.features = Features(
            **{name: torch.cat([side[name].detach() for side in sides]).requires_grad_() for name in sides[0]}
        )

    def backward(self, before_last: Callable[[], None]) -> None:
        """Propagate the gradients of the features through the towers.

        Args:
            before_last: Called before the last part, after which every gradient is complete.
        """
        images, texts = [len(part.pixels) for part in self._parts], [len(part.tokens) for part in self._parts]
        gradients = {
            name: torch.split(rows.grad, texts if name.startswith("text") else images)
            for name, rows in self.features.by_name().items()
            if rows.grad is not None
        }
        # The last part's activations exist already; freed first, they leave room for the others'.
        last = len(self._parts) - 1
        for number in (last, *range(last)):
            if number == max(0, last - 1):
                before_last()
            features = (self._last if number == last else self._run(self._parts[number])).by_name()
            pairs = [
                (features[name], gradient[number])
                for name, gradient in gradients.items()
                if features[name].requires_grad
            ]
            if pairs:
                torch.autograd.backward([side for side, _ in pairs], [gradient for _, gradient in pairs])

    def _run(self, part: BatchPart) -> Features:
        # Dropout and the like draw from a seed of their own: nothing to save, nothing to restore.
        torch.manual_seed(part.seed)
        return self._encode(part)


@dataclass(frozen=True)
class BatchEncoder:
    """Encodes a process's share of a batch with the model in training.

    Attributes:
        encode: Runs both towers: `PrunedForward` of the model, or `compile_towers`.
        precision: Number format of the towers.
        changes_colors: Whether batches carry colour maps that change anything.
        num_parts: Parts that a share is encoded in, one at a time.
        short: Encodes images from some of their patches, for batches that say which, and patches and tokens.
        with_tokens: Whether features of patches and tokens are wanted too.
    """

    model: ClipModel
    encode: EncodeBoth
    precision: Precision
    changes_colors: bool
    num_parts: int
    short: PrunedForward
    with_tokens: bool = False

    def __call__(
        self, pixels: Tensor, colors: Tensor, tokens: Tensor, seeds: Iterable[int], kept_patches: Tensor | None = None
    ) -> GradCache:
        """Encode a share of b samples.

        Args:
            pixels: uint8 [b, H, W, 3].
            colors: Colour maps, float32 [b, 3, 4].
            tokens: int64 [b, L], on the CPU; [b + e, L] with e texts without images.
            seeds: Seed of dropout and the like for each part.
            kept_patches: Patches of each image that a further pass sees, int64 [b, n]; None without that pass.
        """
        cut = (tensor.tensor_split(self.num_parts) for tensor in (pixels, colors, tokens))
        kept = [None] * self.num_parts if kept_patches is None else kept_patches.tensor_split(self.num_parts)
        return GradCache(self._encode_part, [BatchPart(*part) for part in zip(*cut, seeds, kept, strict=True)])

    def backward(self, encoded: GradCache, before_last: Callable[[], None]) -> None:
        """Propagate the gradients of the features through the towers, see `GradCache.backward`."""
        # Layers that are computed again (--grad-checkpointing) need the attention kernel they had.
        with fast_attention(self.model.device, self.precision.dtype):
            encoded.backward(before_last)

    def _encode_part(self, part: BatchPart) -> Features:
        device = self.model.device
        pixels = part.pixels.to(device, non_blocking=True)
        if self.changes_colors:
            pixels = apply_colors(pixels, part.colors.to(device, non_blocking=True))
        pixels = normalize_pixels(pixels, self.model.info.preprocess)
        with self.precision.autocast(device), fast_attention(device, self.precision.dtype):
            if self.with_tokens:
                image, text, image_tokens, text_tokens = self.short.encode_tokens(pixels, part.tokens)
                features = Features(image, text, None, image_tokens, text_tokens)
            else:
                features = Features(*self.encode(pixels, part.tokens))
            if part.kept_patches is None:
                return features
            kept_patches = part.kept_patches.to(device, non_blocking=True)
            return replace(features, masked_image=self.short.encode_masked_images(pixels, kept_patches))


def compile_towers(module: Any) -> EncodeBoth:
    """Compile the forward pass of both towers with torch.compile, at its first call."""

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
                "Omit --torchcompile; on a CPU it needs a C++ compiler (g++).",
            ) from error

    return call
