"""What a worker of `embed` does: the samples of a batch to pixels and tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from clipcid_cli.formats.data.samples import Sample
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.runtime.models.clip_model import Transform
from clipcid_cli.runtime.models.decode import SkippedImage, had_alpha, read_image
from clipcid_cli.runtime.models.tokenizer import Tokenizer
from clipcid_cli.runtime.text_variants import TextVariants
from clipcid_cli.steps.embed.views import BatchViews, ViewMaker


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Pixels and tokens of a batch; always of the full size B, missing rows are zero.

    Attributes:
        pixels: uint8 [(1 + V)·B, H, W, 3]: the images preprocessed for evaluation, then view after view.
        colors: Colour maps of the views, float32 [B, V, 3, 4]; None without views.
        params: float32 [B, V, P], the numbers that reproduce the views, see `MixedView.pack`; None likewise.
        tokens: int64 by kind: of first captions [B, L]; of those after the first, sample after sample, [F, L], F a multiple
            of B (0 where no sample has several); of the first variant of each sample, then the second, [W·B, L].
        failures: Reason by position, for images that could not be used.
        laid_on_white: Number of images with transparent pixels.
    """

    pixels: torch.Tensor
    colors: torch.Tensor | None
    params: npt.NDArray[np.float32] | None
    tokens: dict[Kind, torch.Tensor]
    failures: dict[int, str]
    laid_on_white: int


@dataclasses.dataclass(frozen=True)
class Preparation:
    """Decodes images and tokenises captions.

    Attributes:
        transform: RGB image to uint8 [H, W, 3]; None for data without images.
        views: Draws augmented views; None for none.
        tokenizer: Texts to int64 [n, L]; None where no captions are embedded.
        text_variants: Makes variants of captions; None for none.
        batch_size: B.
        fast_decode: Whether JPEGs are decoded at a reduced size, of at least twice H × W.
    """

    transform: Transform | None
    views: ViewMaker | None
    tokenizer: Tokenizer | None
    text_variants: TextVariants | None
    batch_size: int
    image_size: tuple[int, int]
    context_length: int
    fast_decode: bool

    def __call__(self, samples: Sequence[Sample]) -> Prepared:
        """Prepare the samples of one batch."""
        height, width = self.image_size
        draft = (2 * width, 2 * height) if self.fast_decode else None
        pictures = 0 if self.transform is None else 1 if self.views is None else 1 + self.views.views.number
        pixels = torch.zeros(pictures, self.batch_size, height, width, 3, dtype=torch.uint8)
        views = None
        if self.views is not None:
            views = BatchViews(self.views, [sample.key for sample in samples], pixels[1:].numpy())
        failures = dict[int, str]()
        laid_on_white = 0
        for row, sample in enumerate(samples if self.transform is not None else ()):
            image = read_image(sample.image, draft)
            if isinstance(image, SkippedImage):
                failures[row] = image.reason
                continue
            assert self.transform is not None
            laid_on_white += had_alpha(image)
            pixels[0, row] = self.transform(image)
            if views is not None:
                views.add(row, image)
        colors = params = None
        if views is not None:
            views.mix()
            colors = torch.from_numpy(views.colors)
            params = views.params
        return Prepared(pixels.flatten(0, 1), colors, params, self._tokenize(samples), failures, laid_on_white)

    def _tokenize(self, samples: Sequence[Sample]) -> dict[Kind, torch.Tensor]:
        if self.tokenizer is None:
            return {}
        further = [caption for sample in samples for caption in sample.captions[1:]]
        tokens = {
            Kind.TEXTS: self._fill(self.tokenizer, [sample.captions[0] for sample in samples], self.batch_size),
            Kind.FURTHER: self._fill(self.tokenizer, further, -(-len(further) // self.batch_size) * self.batch_size),
        }
        make = self.text_variants
        if make is not None:
            texts = [[make(sample.captions, sample.key, number) for sample in samples] for number in range(make.number)]
            tokens[Kind.VARIANTS] = torch.cat([self._fill(self.tokenizer, each, self.batch_size) for each in texts])
        return tokens

    def _fill(self, tokenizer: Tokenizer, captions: list[str], rows: int) -> torch.Tensor:
        tokens = torch.zeros(rows, self.context_length, dtype=torch.int64)
        if captions:
            tokens[: len(captions)] = tokenizer(captions)
        return tokens
