"""The rows of a shard that is being embedded, collected batch by batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from clipcid_cli.formats.data.samples import Sample
from clipcid_cli.formats.embeddings.writer import ShardRows
from clipcid_cli.formats.skips import Skips
from clipcid_cli.runtime.models.augment import PACKED_VIEW, PARTNER
from clipcid_cli.steps.embed.views import Views

Float16 = npt.NDArray[np.float16]


@dataclasses.dataclass(frozen=True)
class BatchRows:
    """The embeddings of one batch, of n samples.

    Attributes:
        images: float16 [n, D].
        views: float16 [n, V, D]; V = 0 without views.
        params: Parameters of the views, float32 [n, V, P]; None without views.
        texts: Of the first captions, float16 [n, D]; None when texts are not embedded.
        further: Of the captions after the first, sample after sample, float16 [F, D].
        owners: Position of the sample of each of those, int64 [F].
        variants: Of variants of the captions, float16 [n, W, D]; W = 0 without variants.
    """

    images: Float16
    views: Float16
    params: npt.NDArray[np.float32] | None
    texts: Float16 | None
    further: Float16
    owners: npt.NDArray[np.int64]
    variants: Float16

    def finite(self) -> npt.NDArray[np.bool_]:
        """Mark the samples all of whose rows are finite and not zero, bool [n]."""
        usable = _finite(self.images) & _finite(self.views).all(axis=1) & _finite(self.variants).all(axis=1)
        if self.texts is not None:
            usable &= _finite(self.texts)
        usable[self.owners[~_finite(self.further)]] = False
        return usable


@dataclasses.dataclass
class PendingShard:
    """A shard of which some batches are still to come.

    Attributes:
        skips: Samples whose image or embedding is not usable.
        flattened: Images with transparent pixels.
    """

    skips: Skips = dataclasses.field(default_factory=Skips)
    flattened: int = 0
    keys: list[str] = dataclasses.field(default_factory=list)
    captions: list[str] = dataclasses.field(default_factory=list)
    caption_counts: list[int] = dataclasses.field(default_factory=list)
    images: list[Float16] = dataclasses.field(default_factory=list)
    texts: list[Float16] = dataclasses.field(default_factory=list)
    further: list[Float16] = dataclasses.field(default_factory=list)
    views: list[Float16] = dataclasses.field(default_factory=list)
    view_params: list[npt.NDArray[np.float32]] = dataclasses.field(default_factory=list)
    variants: list[Float16] = dataclasses.field(default_factory=list)

    def add(self, samples: Sequence[Sample], rows: BatchRows, kept: Sequence[int]) -> None:
        """Append the rows of a batch.

        Args:
            samples: The batch's n samples.
            kept: Positions of those to take, ascending.
        """
        self.keys.extend(samples[row].key for row in kept)
        self.captions.extend(samples[row].captions[0] if samples[row].captions else "" for row in kept)
        self.images.append(rows.images[kept])
        if rows.texts is not None:
            self.texts.append(rows.texts[kept])
            self.caption_counts.extend(len(samples[row].captions) for row in kept)
            self.further.append(rows.further[np.isin(rows.owners, kept)])
            self.variants.append(rows.variants[kept])
        if rows.params is not None:
            self.views.append(rows.views[kept])
            self.view_params.append(_renumber_partners(rows.params, kept))

    def join(self, width: int, shown: Views | None, *, with_texts: bool, num_variants: int) -> ShardRows:
        """Return all rows as one array each; a shard without a usable sample has none.

        Args:
            width: D.
            shown: The views; None without any.
            num_variants: Variants of each sample's captions, 0 for none.
        """
        empty = np.empty((0, width), dtype=np.float16)
        several = max(self.caption_counts, default=1) > 1
        num_views, packed_size = (0, 0) if shown is None else (shown.number, shown.packed_size)
        no_views = np.empty((0, num_views, width), dtype=np.float16)
        no_params = np.empty((0, num_views, packed_size), dtype=np.float32)
        no_variants = np.empty((0, num_variants, width), dtype=np.float16)
        return ShardRows(
            images=np.concatenate([empty, *self.images]),
            texts=np.concatenate([empty, *self.texts]) if with_texts else None,
            caption_counts=self.caption_counts if several else None,
            further=np.concatenate(self.further) if several else None,
            views=np.concatenate([no_views, *self.views]) if num_views else None,
            view_params=np.concatenate([no_params, *self.view_params]) if num_views else None,
            variants=np.concatenate([no_variants, *self.variants]) if num_variants else None,
        )


def _renumber_partners(params: npt.NDArray[np.float32], kept: Sequence[int]) -> npt.NDArray[np.float32]:
    """Take the parameters of the kept samples [n, V, P], with the places of partners counted among these.

    A partner that is not kept has no row: its place is NaN.
    """
    taken = params[kept]
    if params.shape[2] > PACKED_VIEW:
        places = np.full(len(params), np.nan)
        places[kept] = np.arange(len(kept))
        partners = np.array(kept, dtype=np.int64)[:, None] + taken[:, :, PARTNER].astype(np.int64)
        taken[:, :, PARTNER] = places[partners] - np.arange(len(kept))[:, None]
    return taken


def _finite(rows: Float16) -> npt.NDArray[np.bool_]:
    """Mark the rows that are finite and not zero, which no distance can be measured from."""
    return np.asarray(np.isfinite(rows).all(axis=-1) & rows.any(axis=-1), dtype=np.bool_)
