"""What `embed` makes of samples: rows of float16 of images and captions, and beside them of views and text variants.

A view is drawn from the seed, the image's key, its batch and the view's number alone.

Shape letters beside those of `steps.encode`: B samples of a full batch, V views of each, P numbers that describe one, W text
variants of each.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from clipcid_cli.errors import UsageError
from clipcid_cli.formats.data.samples import Sample
from clipcid_cli.formats.embeddings.rows import Kind
from clipcid_cli.runtime.distributed import DistContext
from clipcid_cli.runtime.models.augment import STRONG, Augmentation, choose_view
from clipcid_cli.runtime.models.clip_model import ClipModel, hash_preprocess, normalize_pixels
from clipcid_cli.runtime.models.load import load_model
from clipcid_cli.runtime.models.towers import Towers
from clipcid_cli.runtime.models.views import (
    PACKED_MIX,
    PACKED_VIEW,
    PARTNER,
    MixedView,
    Renderer,
    View,
    apply_colors,
    identity_colors,
    mix_pixels,
)
from clipcid_cli.runtime.pipeline import start_worker_server
from clipcid_cli.runtime.precision import Precision, choose_precision
from clipcid_cli.runtime.randomness import derive_seed
from clipcid_cli.runtime.text_variants import TextVariants
from clipcid_cli.steps.embed.plan import EmbedPlan
from clipcid_cli.steps.encode import BATCH_SIZES, Decoded, Decoder, Encoded
from clipcid_cli.steps.preflight import choose_workers


@dataclasses.dataclass(frozen=True)
class Views:
    """Which augmented views of each image are embedded in addition to its evaluation crop."""

    number: int  # V, at least 1
    kinds: tuple[str, ...]  # view v is of kind v modulo their number: `crop`, `strong` or `mix`
    augmentation: Augmentation  # how views of kind `crop`, and both images of a `mix`, are drawn
    seed: int

    def kind(self, number: int) -> str:
        return self.kinds[number % len(self.kinds)]

    @property
    def mixes(self) -> bool:
        """Whether any view shows two images."""
        return "mix" in self.kinds[: self.number]

    @property
    def packed_size(self) -> int:
        """Numbers stored of each view."""
        return PACKED_MIX if self.mixes else PACKED_VIEW

    @property
    def strongest(self) -> Augmentation:
        """The smallest crops and strongest colours of any kind."""
        drawn = self.augmentation
        if "strong" not in self.kinds[: self.number]:
            return drawn
        return Augmentation(
            crop_scale=min(drawn.crop_scale, STRONG.crop_scale),
            color_jitter=max(drawn.color_jitter, STRONG.color_jitter),
            gray_probability=max(drawn.gray_probability, STRONG.gray_probability),
        )


class _Mixture(NamedTuple):
    """A view that shows a second image of the batch too: rows of both in the batch, and λ, the weight of the first."""

    row: int
    number: int  # of the view
    other: int
    weight: float


def _draw_views(
    views: Views,
    render: Renderer,
    keys: Sequence[str],
    images: Iterable[tuple[int, Image.Image]],
    pixels: npt.NDArray[np.uint8],
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Draw the views of a batch as its images are decoded: of each only crops are held.

    A mixture whose second image cannot be read is a view of the first alone.

    Args:
        images: Those that can be read, by their rows.
        pixels: What the views are written to, uint8 [V, B, H, W, 3].

    Returns:
        The colour maps that the pixels still need, [B, V, 3, 4], and the numbers that reproduce the views, [B, V, P].
    """
    shape = pixels.shape[1], views.number
    colors = np.zeros((*shape, 3, 4), dtype=np.float32)
    params = np.zeros((*shape, views.packed_size), dtype=np.float32)
    firsts = dict[tuple[int, int], View]()
    seconds = list[tuple[_Mixture, View, npt.NDArray[np.uint8]]]()
    wanted = defaultdict[int, list[_Mixture]](list)
    for mixture in _choose_mixtures(views, keys):
        wanted[mixture.other].append(mixture)
    for row, image in images:
        for number in range(views.number):
            drawn = STRONG if views.kind(number) == "strong" else views.augmentation
            view = choose_view(drawn, *image.size, derive_seed("view", views.seed, number, keys[row]))
            pixels[number, row] = render(image, view)
            firsts[row, number] = view
            colors[row, number] = view.colors
            params[row, number] = MixedView(view, 1.0, 0.0, view).pack()[: views.packed_size]
        for mixture in wanted[row]:
            seed = derive_seed("mixed view", views.seed, mixture.number, keys[mixture.row])
            second = choose_view(views.augmentation, *image.size, seed)
            seconds.append((mixture, second, render(image, second)))
    for mixture, second, shown in seconds:
        row = mixture.row
        number = mixture.number
        first = firsts.get((row, number))
        if first is not None:
            mixed = MixedView(first, mixture.weight, mixture.other - row, second)
            pixels[number, row] = mix_pixels(mixed, pixels[number, row], shown)
            colors[row, number] = identity_colors()
            params[row, number] = mixed.pack()
    return colors, params


def _choose_mixtures(views: Views, keys: Sequence[str]) -> Iterator[_Mixture]:
    """Choose the second image of each mixture among the others of the batch; none where an image is alone."""
    numbers = [number for number in range(views.number) if views.kind(number) == "mix"]
    for row, key in enumerate(keys if len(keys) > 1 else ()):
        for number in numbers:
            random = np.random.default_rng(derive_seed("mix", views.seed, number, key))
            other = int(random.integers(len(keys) - 1))
            weight = float(np.float32(random.uniform(0.5, 1)))  # as it is stored
            yield _Mixture(row, number, other + (other >= row), weight)


@dataclasses.dataclass
class Augmented(Decoded):
    """A decoded batch with what is shown beside it; always of the full size, missing rows are zero.

    `pixels` are uint8 [(1 + V)·B, H, W, 3]: the images preprocessed for evaluation, then view after view.
    """

    colors: torch.Tensor | None = None  # colour maps of the views, float32 [B, V, 3, 4]
    params: torch.Tensor | None = None  # the numbers that reproduce the views, float32 [B, V, P]
    # Tokens of the first variant of each sample, then of the second, int64 [W·B, L].
    variants: torch.Tensor | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class AugmentingDecoder(Decoder):
    """Decodes a batch, and makes its views and text variants."""

    batch_size: int
    views: Views | None
    text_variants: TextVariants | None

    def __call__(self, samples: Sequence[Sample]) -> Augmented:
        decoded = Augmented(tokens=self.tokenize([caption for sample in samples for caption in sample.captions]))
        vary = self.text_variants
        if vary is not None:
            texts = [[vary(sample.captions, sample.key, number) for sample in samples] for number in range(vary.number)]
            decoded.variants = torch.cat([tokens for each in texts if (tokens := self.tokenize(each)) is not None])
        render = self.render
        if render is None:
            return decoded
        pictures = 1 if self.views is None else 1 + self.views.number
        width, height = render.size
        pixels = torch.zeros(pictures, self.batch_size, height, width, 3, dtype=torch.uint8)

        def prepare() -> Iterator[tuple[int, Image.Image]]:
            for row, image in self.read_images(samples, decoded, render):
                pixels[0, row].numpy()[:] = render(image)
                yield row, image

        if self.views is None:
            deque(prepare(), maxlen=0)
        else:
            keys = [sample.key for sample in samples]
            made = _draw_views(self.views, render, keys, prepare(), pixels[1:].numpy())
            decoded.colors, decoded.params = map(torch.from_numpy, made)
        decoded.pixels = pixels.flatten(0, 1)
        return decoded


@dataclasses.dataclass(frozen=True)
class EmbedEncoder:
    """Encodes batches of one size, so that a row's bits depend on its batch alone, to rows of float16."""

    model: ClipModel
    precision: Precision
    # Pictures, views among them, that are encoded together; `decoder.batch_size` counts samples.
    batch_size: int
    workers: int
    decoder: AugmentingDecoder

    @property
    def shapes(self) -> dict[Kind, tuple[int, ...]]:
        """Shape of what is made of a sample, by kind, but for captions after the first."""
        made = self.decoder
        width = self.model.info.embed_dim
        found: dict[Kind, tuple[int, ...]] = {}
        if made.render is not None:
            found[Kind.IMAGES] = (width,)
        if made.tokenizer is not None:
            found[Kind.TEXTS] = (width,)
        if made.views is not None:
            found[Kind.VIEWS] = (made.views.number, width)
            found[Kind.VIEW_PARAMS] = (made.views.number, made.views.packed_size)
        if made.text_variants is not None:
            found[Kind.VARIANTS] = (made.text_variants.number, width)
        return found

    @property
    def bytes_per_sample(self) -> int:
        """What a sample takes on the disk, with its first caption, views and text variants, without its metadata."""
        return sum(kind.dtype.itemsize * math.prod(shape) for kind, shape in self.shapes.items())

    @property
    def settings(self) -> dict[str, Any]:
        """What of the model decides the rows, as JSON values."""
        info = self.model.info
        with_texts = self.decoder.tokenizer is not None
        found = {
            "weights": info.weights_hash,
            "tokenizer": f"{info.tokenizer}, {info.context_length} tokens" if with_texts else None,
            "precision": self.precision.name,
            "batch_size": self.batch_size,
        }
        if self.decoder.render is not None:
            found["preprocess"] = hash_preprocess(info.preprocess, fast_decode=self.decoder.fast_decode)
        return found

    def describe(self) -> str:
        """Say how it encodes, and what it makes beside images and captions."""
        precision = self.precision
        made = self.decoder
        more = list[str]()
        if made.views is not None:
            mixing = f"; mixtures within batches of {made.batch_size} images" if made.views.mixes else ""
            more.append(f"{made.views.number} views ({', '.join(made.views.kinds)}{mixing})")
        if made.text_variants is not None:
            more.append(f"{made.text_variants.number} text variants")
        size = f" For each image {' and '.join(more)}: {self.bytes_per_sample:,} bytes per image." if more else ""
        return (
            f"{self.model.info.parameters / 1e6:.1f} M parameters, precision {precision.name} ({precision.reason}), batches "
            f"of {self.batch_size}, {self.workers} worker{'' if self.workers == 1 else 's'} per process.{size}"
        )

    def __call__(self, decoded: Decoded) -> dict[Kind, torch.Tensor]:
        """Encode a batch: images [B, D], texts [M, D], views [B, V, D] with their numbers [B, V, P], variants [B, W, D]."""
        assert isinstance(decoded, Augmented), "made by an AugmentingDecoder"
        towers = Towers.from_model(self.model, self.precision, self.decoder.batch_size)
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
        for kind in rows.keys() - {Kind.VIEW_PARAMS}:
            # From a row of zeros no distance can be measured either.
            rows[kind] = rows[kind].masked_fill(~rows[kind].any(dim=-1, keepdim=True), torch.nan)
        return rows

    def _by_sample(self, rows: torch.Tensor) -> torch.Tensor:
        """Turn what was made of all samples, then of all again, [n·B, D], into float16 [B, n, D]."""
        return rows.half().cpu().view(-1, self.decoder.batch_size, rows.shape[1]).transpose(0, 1)

    def _color(self, pixels: torch.Tensor, colors: torch.Tensor | None) -> torch.Tensor:
        """Apply the colour maps of views to their pixels."""
        views = self.decoder.views
        if views is None or colors is None or not views.strongest.changes_colors:
            return pixels
        maps = torch.eye(3, 4).repeat(len(pixels), 1, 1)
        maps[self.decoder.batch_size :] = colors.transpose(0, 1).reshape(-1, 3, 4)  # view after view, as the pixels
        device = self.model.device
        shown = apply_colors(pixels.to(device, non_blocking=True), maps.to(device, non_blocking=True))
        return normalize_pixels(shown, self.model.info.preprocess)


def load_encoder(plan: EmbedPlan, context: DistContext) -> EmbedEncoder:
    """Load the model on every process."""
    settings = plan.settings
    workers = choose_workers(settings.workers, context.device)
    if workers:
        start_worker_server()
    model = context.on_all(lambda: load_model(plan.name, context.device))
    precision = choose_precision(settings.precision, context.device, "embed", model.info.parameters)
    model.cast_products(precision)
    augmentation = Augmentation(settings.crop_scale, settings.color_jitter, settings.gray_probability)
    views = Views(settings.views, settings.view_kinds, augmentation, settings.seed) if settings.views else None
    batch_size = settings.batch_size or BATCH_SIZES[context.device.type]
    if views is not None and views.mixes and batch_size < (min_size := 2 * (1 + views.number)):
        raise UsageError(
            f"--view-kind mix mixes the images of a batch, but with --batch-size {batch_size} and {views.number} views it "
            "holds one.",
            f"Give --batch-size {min_size} or more, or fewer --views: a batch holds batch size/(1 + views) images.",
        )
    decoder = AugmentingDecoder(
        render=Renderer(model.info.preprocess),
        tokenizer=model.tokenizer if settings.text else None,
        # With views each sample makes 1 + V pictures: a batch's memory stays what it is.
        batch_size=batch_size if views is None else max(1, batch_size // (1 + views.number)),
        fast_decode=settings.fast_decode,
        views=views,
        text_variants=TextVariants(settings.text_variants, settings.seed) if settings.text_variants else None,
    )
    return EmbedEncoder(model, precision, batch_size, workers, decoder)


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
