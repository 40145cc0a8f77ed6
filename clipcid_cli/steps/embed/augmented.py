"""What `embed` makes beside rows of images and captions, where it is asked for: rows of views and of text variants.

A view is drawn from the seed, the image's key, its batch and the view's number alone.

Shape letters beside those of `steps.encode`: B samples of a full batch, V views of each, P numbers that describe one, W text
variants of each.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from clipcid_cli.errors import UsageError
from clipcid_cli.formats.data.samples import Sample
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.runtime.models.augment import STRONG, Augmentation, choose_view
from clipcid_cli.runtime.models.clip_model import ClipModel, normalize_pixels
from clipcid_cli.runtime.models.renderer import Renderer
from clipcid_cli.runtime.models.views import (
    PACKED_MIX,
    PACKED_VIEW,
    PARTNER,
    MixedView,
    View,
    apply_colors,
    identity_colors,
    mix_pixels,
)
from clipcid_cli.runtime.precision import Precision
from clipcid_cli.runtime.randomness import derive_seed
from clipcid_cli.runtime.text_variants import RULES, TextVariants
from clipcid_cli.steps.embed.encoder import EmbedEncoder, without_zeros
from clipcid_cli.steps.encode import Decoded, Decoder, Encoded
from clipcid_cli.steps.settings.embed import EmbedSettings


@dataclasses.dataclass(frozen=True)
class Views:
    """Which augmented views of each image are embedded in addition to its evaluation crop."""

    count: int  # V, at least 1
    kinds: tuple[str, ...]  # view v is of kind v modulo the number of kinds: `crop`, `strong` or `mix`
    augmentation: Augmentation  # how views of kind `crop`, and both images of a `mix`, are drawn
    seed: int

    def kind(self, view_index: int) -> str:
        return self.kinds[view_index % len(self.kinds)]

    @property
    def mixes(self) -> bool:
        """Whether any view shows two images."""
        return "mix" in self.kinds[: self.count]

    @property
    def packed_size(self) -> int:
        """Numbers stored of each view."""
        return PACKED_MIX if self.mixes else PACKED_VIEW

    @property
    def strongest(self) -> Augmentation:
        """The smallest crops and strongest colours of any kind."""
        drawn = self.augmentation
        if "strong" not in self.kinds[: self.count]:
            return drawn
        return Augmentation(
            crop_scale=min(drawn.crop_scale, STRONG.crop_scale),
            color_jitter=max(drawn.color_jitter, STRONG.color_jitter),
            gray_probability=max(drawn.gray_probability, STRONG.gray_probability),
        )


class _Mixture(NamedTuple):
    """A view that shows a second image of the batch too: rows of both in the batch, and λ, the weight of the first."""

    row: int
    view_index: int
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
    shape = pixels.shape[1], views.count
    colors = np.zeros((*shape, 3, 4), dtype=np.float32)
    params = np.zeros((*shape, views.packed_size), dtype=np.float32)
    firsts = dict[tuple[int, int], View]()
    seconds = list[tuple[_Mixture, View, npt.NDArray[np.uint8]]]()
    wanted = defaultdict[int, list[_Mixture]](list)
    for mixture in _choose_mixtures(views, keys):
        wanted[mixture.other].append(mixture)
    for row, image in images:
        for view_index in range(views.count):
            drawn = STRONG if views.kind(view_index) == "strong" else views.augmentation
            view = choose_view(drawn, *image.size, derive_seed("view", views.seed, view_index, keys[row]))
            pixels[view_index, row] = render(image, view)
            firsts[row, view_index] = view
            colors[row, view_index] = view.colors
            params[row, view_index] = MixedView(view, 1.0, 0.0, view).pack()[: views.packed_size]
        for mixture in wanted[row]:
            seed = derive_seed("mixed view", views.seed, mixture.view_index, keys[mixture.row])
            second = choose_view(views.augmentation, *image.size, seed)
            seconds.append((mixture, second, render(image, second)))
    for mixture, second, shown in seconds:
        row = mixture.row
        view_index = mixture.view_index
        first = firsts.get((row, view_index))
        if first is not None:
            mixed = MixedView(first, mixture.weight, mixture.other - row, second)
            pixels[view_index, row] = mix_pixels(mixed, pixels[view_index, row], shown)
            colors[row, view_index] = identity_colors()
            params[row, view_index] = mixed.pack()
    return colors, params


def _choose_mixtures(views: Views, keys: Sequence[str]) -> Iterator[_Mixture]:
    """Choose the second image of each mixture among the others of the batch; none where an image is alone."""
    mixed = [view_index for view_index in range(views.count) if views.kind(view_index) == "mix"]
    for row, key in enumerate(keys if len(keys) > 1 else ()):
        for view_index in mixed:
            random = np.random.default_rng(derive_seed("mix", views.seed, view_index, key))
            other = int(random.integers(len(keys) - 1))
            weight = float(np.float32(random.uniform(0.5, 1)))  # as it is stored
            yield _Mixture(row, view_index, other + (other >= row), weight)


@dataclasses.dataclass
class Augmented(Decoded):
    """A decoded batch with its views and text variants; always of the full size, missing rows are zero.

    `pixels` are uint8 [(1 + V)·B, H, W, 3]: the images preprocessed for evaluation, then view after view.
    """

    colors: torch.Tensor | None = None  # colour maps of the views, float32 [B, V, 3, 4]
    params: torch.Tensor | None = None  # the numbers that reproduce the views, float32 [B, V, P]
    # Tokens of the first variant of each sample, then of the second, int64 [W·B, L].
    variants: torch.Tensor | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class AugmentingDecoder(Decoder):
    """Decodes a batch, and makes its views and text variants."""

    render: Renderer
    batch_size: int
    views: Views | None
    text_variants: TextVariants | None

    def __call__(self, samples: Sequence[Sample]) -> Augmented:
        decoded = Augmented(tokens=self.tokenize([caption for sample in samples for caption in sample.captions]))
        if self.text_variants is not None:
            decoded.variants = self._vary(self.text_variants, samples)
        pictures = 1 if self.views is None else 1 + self.views.count
        width, height = self.render.size
        pixels = torch.zeros(pictures, self.batch_size, height, width, 3, dtype=torch.uint8)

        def prepare() -> Iterator[tuple[int, Image.Image]]:
            for row, image in self.read_images(samples, decoded, self.render):
                pixels[0, row].numpy()[:] = self.render(image)
                yield row, image

        if self.views is None:
            deque(prepare(), maxlen=0)
        else:
            keys = [sample.key for sample in samples]
            colors, params = _draw_views(self.views, self.render, keys, prepare(), pixels[1:].numpy())
            decoded.colors = torch.from_numpy(colors)
            decoded.params = torch.from_numpy(params)
        decoded.pixels = pixels.flatten(0, 1)
        return decoded

    def _vary(self, vary: TextVariants, samples: Sequence[Sample]) -> torch.Tensor:
        """Return the tokens of the first variant of each sample, then of the second."""
        tokens = list[torch.Tensor]()
        for variant in range(vary.number):
            variants = self.tokenize([vary(sample.captions, sample.key, variant) for sample in samples])
            assert variants is not None, "variants are of captions that are embedded"
            tokens.append(variants)
        return torch.cat(tokens)


@dataclasses.dataclass(frozen=True)
class AugmentingEncoder(EmbedEncoder):
    """Encodes views and text variants too."""

    decoder: AugmentingDecoder

    @property
    def shapes(self) -> dict[Kind, tuple[int, ...]]:
        shapes = super().shapes
        width = self.model.info.embed_dim
        views = self.decoder.views
        if views is not None:
            shapes[Kind.VIEWS] = (views.count, width)
            shapes[Kind.VIEW_PARAMS] = (views.count, views.packed_size)
        if self.decoder.text_variants is not None:
            shapes[Kind.VARIANTS] = (self.decoder.text_variants.number, width)
        return shapes

    def describe(self) -> str:
        views = self.decoder.views
        variants = self.decoder.text_variants
        more = list[str]()
        if views is not None:
            mixing = f"; mixtures within batches of {self.decoder.batch_size} images" if views.mixes else ""
            more.append(f"{views.count} views ({', '.join(views.kinds)}{mixing})")
        if variants is not None:
            more.append(f"{variants.number} text variants")
        size = f"{self.bytes_per_sample:,} bytes per image"
        return f"{super().describe()} For each image {' and '.join(more)}: {size}."

    def __call__(self, decoded: Decoded) -> dict[Kind, torch.Tensor]:
        """Encode a batch: images [B, D], texts [M, D], views [B, V, D] with their numbers [B, V, P], variants [B, W, D]."""
        assert isinstance(decoded, Augmented), "made by an AugmentingDecoder"
        assert decoded.pixels is not None
        pictures = self._by_sample(self.towers.images(self._color(decoded.pixels, decoded.colors)))
        rows = {Kind.IMAGES: pictures[:, 0]}
        if decoded.tokens is not None:
            rows[Kind.TEXTS] = self.towers.encode_texts(decoded.tokens).half()
        if decoded.params is not None:
            rows[Kind.VIEWS] = pictures[:, 1:]
        if decoded.variants is not None:
            rows[Kind.VARIANTS] = self._by_sample(self.towers.encode_texts(decoded.variants))
        rows = without_zeros(rows)
        if decoded.params is not None:
            rows[Kind.VIEW_PARAMS] = decoded.params
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

    def finish(self, encoded: Encoded) -> None:
        """Count the second images of mixed views among the samples that can be used; one that cannot has no row: NaN."""
        params = encoded.rows.get(Kind.VIEW_PARAMS)
        if params is None or params.shape[2] <= PACKED_VIEW:
            return
        places = torch.full((len(encoded.samples),), torch.nan)
        kept = encoded.kept
        places[kept] = torch.arange(len(kept), dtype=places.dtype)
        rows = torch.arange(len(places))[:, None] + params[:, :, PARTNER].long()
        params[:, :, PARTNER] = places[rows] - places[:, None]


def augmenting_settings(settings: EmbedSettings) -> dict[str, Any]:
    """Return the settings that decide rows of views and of text variants, as JSON values."""
    decisive: dict[str, Any] = {"seed": settings.seed}
    if settings.views:
        for name in ("views", "crop_scale", "color_jitter", "gray_probability"):
            decisive[name] = getattr(settings, name)
        decisive["view_kind"] = list(settings.view_kinds)
        if "strong" in settings.view_kinds:
            decisive["strong_view"] = dataclasses.asdict(STRONG)
    if settings.text_variants:
        decisive |= {"text_variants": settings.text_variants, "text_variant_rules": RULES}
    return decisive


def make_augmenting(
    settings: EmbedSettings,
    model: ClipModel,
    precision: Precision,
    batch_size: int,
    workers: int,
) -> AugmentingEncoder:
    """Make an encoder with the views and text variants that are asked for."""
    views = _choose_views(settings, batch_size)
    decoder = AugmentingDecoder(
        render=Renderer(model.info.preprocess),
        tokenizer=model.tokenizer if settings.text else None,
        # With views each sample makes 1 + V pictures: a batch's memory stays what it is.
        batch_size=batch_size if views is None else max(1, batch_size // (1 + views.count)),
        fast_decode=settings.fast_decode,
        views=views,
        text_variants=TextVariants(settings.text_variants, settings.seed) if settings.text_variants else None,
    )
    return AugmentingEncoder(model, precision, batch_size, workers, decoder)


def _choose_views(settings: EmbedSettings, batch_size: int) -> Views | None:
    if not settings.views:
        return None
    augmentation = Augmentation(settings.crop_scale, settings.color_jitter, settings.gray_probability)
    views = Views(settings.views, settings.view_kinds, augmentation, settings.seed)
    smallest = 2 * (1 + views.count)
    if views.mixes and batch_size < smallest:
        raise UsageError(
            f"--view-kind mix mixes the images of a batch, but with --batch-size {batch_size} and {views.count} views it "
            "holds one.",
            f"Give --batch-size {smallest} or more, or fewer --views: a batch holds batch size/(1 + views) images.",
        )
    return views
