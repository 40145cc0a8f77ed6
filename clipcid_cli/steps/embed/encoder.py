"""What `embed` makes of samples beside images and captions, views and text variants, and its rows of float16.

Shape letters beside those of `steps.encode`: B samples of a full batch, V views of each, P numbers that describe one, W text
variants of each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from clipcid_cli.formats.data.samples import Sample
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.runtime.models.augment import PACKED_VIEW, PARTNER, ViewPixels, apply_colors
from clipcid_cli.runtime.models.clip_model import ClipModel
from clipcid_cli.runtime.models.preprocess import normalize_pixels
from clipcid_cli.runtime.precision import Precision
from clipcid_cli.runtime.text_variants import TextVariants
from clipcid_cli.steps.embed.views import BatchViews, Views
from clipcid_cli.steps.encode import Decoded, Decoder, Encoded, Encoder


@dataclasses.dataclass
class Augmented(Decoded):
    """A decoded batch with what is shown beside it; always of the full size, missing rows are zero.

    Attributes:
        pixels: uint8 [(1 + V)·B, H, W, 3]: the images preprocessed for evaluation, then view after view.
        colors: Colour maps of the views, float32 [B, V, 3, 4].
        params: The numbers that reproduce the views, float32 [B, V, P].
        variants: Tokens of the first variant of each sample, then of the second, int64 [W·B, L].
    """

    colors: torch.Tensor | None = None
    params: torch.Tensor | None = None
    variants: torch.Tensor | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class AugmentingDecoder(Decoder):
    """Decodes a batch, and makes its views and text variants.

    Attributes:
        batch_size: B. With V views each sample makes 1 + V pictures, so that a batch's memory stays what it is.
    """

    batch_size: int
    render: ViewPixels
    views: Views | None
    text_variants: TextVariants | None

    def __call__(self, samples: Sequence[Sample]) -> Augmented:
        """Decode a batch."""
        decoded = Augmented(tokens=self.tokenize([caption for sample in samples for caption in sample.captions]))
        make = self.text_variants
        if make is not None:
            texts = [[make(sample.captions, sample.key, number) for sample in samples] for number in range(make.number)]
            decoded.variants = torch.cat([tokens for each in texts if (tokens := self.tokenize(each)) is not None])
        if self.transform is None:
            return decoded
        pictures = 1 if self.views is None else 1 + self.views.number
        pixels = torch.zeros(pictures, self.batch_size, *self.image_size, 3, dtype=torch.uint8)
        views = None
        if self.views is not None:
            views = BatchViews(self.views, self.render, [sample.key for sample in samples], pixels[1:].numpy())
        for row, image in self.read_images(samples, decoded):
            pixels[0, row] = self.transform(image)
            if views is not None:
                views.add(row, image)
        if views is not None:
            views.mix()
            decoded.colors, decoded.params = torch.from_numpy(views.colors), torch.from_numpy(views.params)
        decoded.pixels = pixels.flatten(0, 1)
        return decoded


@dataclasses.dataclass(frozen=True)
class EmbedEncoder:
    """Encodes batches of one size, so that a row's bits depend on its batch alone, to rows of float16.

    Attributes:
        batch_size: Pictures, and texts, that are encoded together.
        workers: Processes that decode.
    """

    model: ClipModel
    precision: Precision
    batch_size: int
    workers: int
    decoder: AugmentingDecoder

    @property
    def shapes(self) -> dict[Kind, tuple[int, ...]]:
        """Shape of what is made of a sample, by kind; captions after the first, of which samples have any number, apart."""
        made = self.decoder
        width = self.model.info.embed_dim
        found: dict[Kind, tuple[int, ...]] = {}
        if made.transform is not None:
            found[Kind.IMAGES] = (width,)
        if made.tokenizer is not None:
            found[Kind.TEXTS] = (width,)
        if made.views is not None:
            found[Kind.VIEWS] = (made.views.number, width)
            found[Kind.VIEW_PARAMS] = (made.views.number, made.views.packed_size)
        if made.text_variants is not None:
            found[Kind.VARIANTS] = (made.text_variants.number, width)
        return found

    def __call__(self, decoded: Decoded) -> dict[Kind, torch.Tensor]:
        """Encode a batch: images [B, D], texts [M, D], views [B, V, D] with their numbers [B, V, P], variants [B, W, D]."""
        assert isinstance(decoded, Augmented), "made by an AugmentingDecoder"
        towers = Encoder.of(self.model, self.precision, self.decoder.batch_size)
        rows: dict[Kind, torch.Tensor] = {}
        if decoded.pixels is not None:
            pictures = self._by_sample(towers.images(self._color(decoded.pixels, decoded.colors)))
            rows[Kind.IMAGES] = pictures[:, 0]
            if decoded.params is not None:
                rows[Kind.VIEWS] = pictures[:, 1:]
                rows[Kind.VIEW_PARAMS] = decoded.params
        if decoded.tokens is not None:
            rows[Kind.TEXTS] = towers.encode_texts(decoded.tokens).half()
        if decoded.variants is not None:
            rows[Kind.VARIANTS] = self._by_sample(towers.encode_texts(decoded.variants))
        return rows

    def _by_sample(self, rows: torch.Tensor) -> torch.Tensor:
        """Turn what was made of all samples, then of all again, [n·B, D], into float16 [B, n, D]."""
        return rows.half().cpu().view(-1, self.decoder.batch_size, rows.shape[1]).transpose(0, 1)

    def _color(self, pixels: torch.Tensor, colors: torch.Tensor | None) -> torch.Tensor:
        """Apply the colour maps of views to their pixels."""
        views, count = self.decoder.views, self.decoder.batch_size
        if views is None or colors is None or not views.strongest.changes_colors:
            return pixels
        maps = torch.eye(3, 4).repeat(len(pixels), 1, 1)
        maps[count:] = colors.transpose(0, 1).reshape(-1, 3, 4)  # view after view, as the pixels
        device = self.model.device
        shown = apply_colors(pixels.to(device, non_blocking=True), maps.to(device, non_blocking=True))
        return normalize_pixels(shown, self.model.info.preprocess)


def recount_partners(encoded: Encoded) -> None:
    """Count the second images of mixed views among the samples that can be used; one that cannot has no row: NaN."""
    params = encoded.rows.get(Kind.VIEW_PARAMS)
    if params is None or params.shape[2] <= PACKED_VIEW:
        return
    places = torch.full((len(encoded.samples),), torch.nan)
    kept = encoded.kept
    places[kept] = torch.arange(len(kept), dtype=places.dtype)
    rows = torch.arange(len(places))[:, None] + params[:, :, PARTNER].long()
    params[:, :, PARTNER] = places[rows] - places[:, None]
