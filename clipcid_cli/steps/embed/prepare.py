"""What a worker of `embed` does: the samples of a batch to pixels and tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from clipcid_cli.formats.data.samples import Sample
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.runtime.models.augment import ViewPixels
from clipcid_cli.runtime.models.clip_model import Transform
from clipcid_cli.runtime.models.decode import SkippedImage, had_alpha, read_image
from clipcid_cli.runtime.models.tokenizer import Tokenizer
from clipcid_cli.runtime.text_variants import TextVariants
from clipcid_cli.steps.embed.views import BatchViews, Views


@dataclasses.dataclass
class Prepared:
    """Pixels and tokens of a batch; always of the full size B, missing rows are zero.

    Attributes:
        pixels: uint8 [(1 + V)·B, H, W, 3]: the images preprocessed for evaluation, then view after view.
        tokens: int64 by kind: of first captions [B, L]; of those after the first, sample after sample, [F, L], F a multiple
            of B (0 where no sample has several); of the first variant of each sample, then the second, [W·B, L].
        colors: Colour maps of the views, float32 [B, V, 3, 4]; None without views.
        params: The numbers that reproduce the views, float32 [B, V, P]; None likewise.
    """

    pixels: torch.Tensor
    tokens: dict[Kind, torch.Tensor]
    colors: torch.Tensor | None = None
    params: npt.NDArray[np.float32] | None = None
    failures: dict[int, str] = dataclasses.field(default_factory=dict)
    laid_on_white: int = 0


@dataclasses.dataclass(frozen=True)
class Preparation:
    """Decodes images and tokenises captions.

    Attributes:
        batch_size: B. With V views each sample makes 1 + V pictures, so that a batch's memory stays what it is.
        transform: RGB image to uint8 [H, W, 3]; None for data without images.
        fast_decode: Whether JPEGs are decoded at a reduced size, of at least twice H × W.
        tokenizer: Texts to int64 [n, L]; None where no captions are embedded.
    """

    batch_size: int
    image_size: tuple[int, int]
    context_length: int
    transform: Transform | None
    fast_decode: bool
    views: Views | None
    render: ViewPixels
    tokenizer: Tokenizer | None
    text_variants: TextVariants | None

    @property
    def with_images(self) -> bool:
        """Whether samples have images that are encoded."""
        return self.transform is not None

    @property
    def with_texts(self) -> bool:
        """Whether captions are encoded; samples must have one."""
        return self.tokenizer is not None

    def __call__(self, samples: Sequence[Sample]) -> Prepared:
        """Prepare the samples of one batch."""
        pictures = 0 if self.transform is None else 1 + (0 if self.views is None else self.views.number)
        pixels = torch.zeros(pictures, self.batch_size, *self.image_size, 3, dtype=torch.uint8)
        prepared = Prepared(pixels.flatten(0, 1), self._tokenize(samples))
        if self.transform is not None:
            self._decode(samples, pixels, self.transform, prepared)
        return prepared

    def _decode(
        self, samples: Sequence[Sample], pixels: torch.Tensor, transform: Transform, prepared: Prepared
    ) -> None:
        height, width = self.image_size
        draft = (2 * width, 2 * height) if self.fast_decode else None
        views = None
        if self.views is not None:
            keys = [sample.key for sample in samples]
            views = BatchViews(self.views, self.render, keys, pixels[1:].numpy())
        for row, sample in enumerate(samples):
            image = read_image(sample.image, draft)
            if isinstance(image, SkippedImage):
                prepared.failures[row] = image.reason
                continue
            prepared.laid_on_white += had_alpha(image)
            pixels[0, row] = transform(image)
            if views is not None:
                views.add(row, image)
        if views is not None:
            views.mix()
            prepared.colors = torch.from_numpy(views.colors)
            prepared.params = views.params

    def _tokenize(self, samples: Sequence[Sample]) -> dict[Kind, torch.Tensor]:
        if self.tokenizer is None:
            return {}
        size = self.batch_size
        further = [caption for sample in samples for caption in sample.captions[1:]]
        tokens = {
            Kind.TEXTS: self._fill(self.tokenizer, [sample.captions[0] for sample in samples], size),
            Kind.FURTHER: self._fill(self.tokenizer, further, -(-len(further) // size) * size),
        }
        make = self.text_variants
        if make is not None:
            texts = [[make(sample.captions, sample.key, number) for sample in samples] for number in range(make.number)]
            tokens[Kind.VARIANTS] = torch.cat([self._fill(self.tokenizer, each, size) for each in texts])
        return tokens

    def _fill(self, tokenizer: Tokenizer, captions: list[str], rows: int) -> torch.Tensor:
        tokens = torch.zeros(rows, self.context_length, dtype=torch.int64)
        if captions:
            tokens[: len(captions)] = tokenizer(captions)
        return tokens
