"""What a worker of `embed` does: a batch of samples to pixels and tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from clipcid_cli.formats.data.samples import Sample
from clipcid_cli.formats.skips import Skips
from clipcid_cli.runtime.models.clip_model import Transform
from clipcid_cli.runtime.models.decode import SkippedImage, had_alpha, read_image
from clipcid_cli.runtime.models.tokenizer import Tokenizer
from clipcid_cli.runtime.text_variants import TextVariants
from clipcid_cli.steps.embed.views import BatchViews, ViewMaker


@dataclasses.dataclass(frozen=True)
class Listing:
    """What reading a shard found.

    Attributes:
        read: Samples looked at, usable or not.
        skips: Those that are not embedded.
    """

    read: int
    skips: Skips


@dataclasses.dataclass(frozen=True)
class EmbedBatch:
    """Samples of one shard that are embedded together.

    Attributes:
        number: Number of the shard.
        samples: At most as many as a batch holds.
        listing: What reading the shard found, with its last batch.
    """

    number: int
    samples: Sequence[Sample]
    listing: Listing | None = None

    def without_data(self) -> EmbedBatch:
        """Return the batch without the bytes that came with a stream."""
        return dataclasses.replace(self, samples=[sample.without_data() for sample in self.samples])


@dataclasses.dataclass(frozen=True)
class PreparedEmbedBatch:
    """Pixels and tokens of a batch, made by a worker; always of the full size B, missing rows are zero.

    Attributes:
        pixels: uint8 [B·(1 + V), H, W, 3]: the images preprocessed for evaluation, then view after view.
        colors: Colour maps of the views, float32 [B, V, 3, 4]; None without views.
        params: float32 [B, V, P], the numbers that reproduce the views, see `MixedView.pack`; None likewise.
        tokens: int64 [B, L], of the first captions, or None when texts are not embedded.
        further: int64 [F, L], of the captions after the first, sample after sample, F a multiple of B (0 where no sample has
            several); None likewise.
        variants: int64 [W·B, L], the first text variant of each sample, then the second; None without variants.
        failures: Reason by position, for images that could not be used.
        flattened: Number of images with transparent pixels, which are shown on white.
    """

    pixels: torch.Tensor
    colors: torch.Tensor | None
    params: npt.NDArray[np.float32] | None
    tokens: torch.Tensor | None
    further: torch.Tensor | None
    variants: torch.Tensor | None
    failures: dict[int, str]
    flattened: int


@dataclasses.dataclass(frozen=True)
class Preparation:
    """Decodes images and tokenises captions, in a worker.

    Attributes:
        transform: RGB image to uint8 [H, W, 3].
        views: Draws augmented views; None for none.
        text_variants: Makes variants of captions; None for none.
        tokenizer: Texts to int64 [n, L], or None.
        fast_decode: Whether JPEGs are decoded at a reduced size, of at least twice H × W.
    """

    transform: Transform
    views: ViewMaker | None
    text_variants: TextVariants | None
    tokenizer: Tokenizer | None
    batch_size: int
    image_size: tuple[int, int]
    context_length: int
    fast_decode: bool

    def __call__(self, samples: Sequence[Sample]) -> PreparedEmbedBatch:
        """Prepare the samples of one batch."""
        height, width = self.image_size
        draft = (2 * width, 2 * height) if self.fast_decode else None
        number = 0 if self.views is None else self.views.views.number
        pixels = torch.zeros(1 + number, self.batch_size, height, width, 3, dtype=torch.uint8)
        keys, views = [sample.key for sample in samples], None
        if self.views is not None:
            views = BatchViews(self.views, keys, pixels[1:].numpy())
        failures, flattened = dict[int, str](), 0
        for row, sample in enumerate(samples):
            image = read_image(sample.image, draft)
            if isinstance(image, SkippedImage):
                failures[row] = image.reason
                continue
            flattened += had_alpha(image)
            pixels[0, row] = self.transform(image)
            if views is not None:
                views.add(row, image)
        colors = params = None
        if views is not None:
            views.mix()
            colors, params = torch.from_numpy(views.colors), views.params
        tokens, further, variants = self._tokenize(samples)
        return PreparedEmbedBatch(pixels.flatten(0, 1), colors, params, tokens, further, variants, failures, flattened)

    def _tokenize(
        self, samples: Sequence[Sample]
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        if self.tokenizer is None:
            return None, None, None
        first = [sample.captions[0] for sample in samples]
        further = [caption for sample in samples for caption in sample.captions[1:]]
        variants, make = None, self.text_variants
        if make is not None:
            texts = [[make(sample.captions, sample.key, number) for sample in samples] for number in range(make.number)]
            variants = torch.cat([self._fill(each, self.batch_size) for each in texts])
        rows = -(-len(further) // self.batch_size) * self.batch_size
        return self._fill(first, self.batch_size), self._fill(further, rows), variants

    def _fill(self, captions: list[str], rows: int) -> torch.Tensor:
        assert self.tokenizer is not None
        tokens = torch.zeros(rows, self.context_length, dtype=torch.int64)
        if captions:
            tokens[: len(captions)] = self.tokenizer(captions)
        return tokens
