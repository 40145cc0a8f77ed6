"""The two towers of a CLIP as what they are to all who encode: pixels to rows, and tokens to rows.

Shape letters: B images of a batch, H × W pixels, M texts, L tokens, D width, C classes, T texts of each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from clipcid_cli.runtime.distributed import DistContext
from clipcid_cli.runtime.models.clip_model import ClipModel
from clipcid_cli.runtime.models.tokenizers import Tokenizer
from clipcid_cli.runtime.pipeline import thread_map, threads_for_batches
from clipcid_cli.runtime.precision import Precision

Encode = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Towers:
    """The towers of a model or of its export, to unit rows. Several threads may call them at once."""

    images: Encode  # uint8 [B, H, W, 3] to [B, D]
    texts: Encode  # int64 [M, L] to [M, D], `batch_size` of them together
    tokenizer: Tokenizer
    device: torch.device
    batch_size: int
    dense: Encode | None = None  # uint8 [B, H, W, 3] to patches [B, h, w, D], where they are wanted

    @classmethod
    def from_model(cls, model: ClipModel, precision: Precision, batch_size: int) -> Towers:
        return cls(
            images=partial(model.encode_images, precision=precision),
            texts=partial(model.encode_texts, precision=precision),
            tokenizer=model.tokenizer,
            device=model.device,
            batch_size=batch_size,
        )

    def encode_texts(self, tokens: Tensor) -> Tensor:
        """Encode any number of texts but 0."""
        rows = list[Tensor]()
        for block in torch.split(tokens, self.batch_size):
            rows.append(self.texts(block).cpu())
        return torch.cat(rows)

    def encode_prompts(self, prompts: Sequence[Sequence[str]], context: DistContext | None = None) -> Tensor:
        """Encode T texts of each of C classes to float32 [C, T, D], dealing the classes to the processes of a machine."""
        templates = len(prompts[0])
        at_once = max(1, self.batch_size // templates)
        starts = range(0, len(prompts), at_once)

        def encode_classes(start: int) -> Tensor:
            texts = [text for of_class in prompts[start : start + at_once] for text in of_class]
            rows = self.encode_texts(self.tokenizer(texts)).float()
            return rows.view(-1, templates, rows.shape[1])

        threads = threads_for_batches(self.device)
        if context is None:
            return torch.cat(list(thread_map(encode_classes, starts, threads)))
        mine = list(thread_map(encode_classes, starts[context.rank :: context.size], threads))
        dealt = context.gather(mine)
        return torch.cat([dealt[turn % context.size][turn // context.size] for turn in range(len(starts))])
