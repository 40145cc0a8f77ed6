"""Embeddings of what samples show: of an image or one of its views, of its first caption or a later one."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from clipcid_cli.formats.embeddings.folder import Embeddings
from clipcid_cli.formats.embeddings.rows import Float16, Rows


@dataclasses.dataclass(frozen=True)
class ImageRows:
    """Embeddings of the images themselves, or of their views.

    Attributes:
        rows: Mapped from their files: [N, D] of the images, or [N·V, D] of their views.
        num_views: V, 0 where they are of the images themselves.
    """

    rows: Rows
    num_views: int

    @classmethod
    def of(cls, embeddings: Embeddings, *, views: bool) -> ImageRows:
        """Map the rows of the images, or of their views."""
        return cls(embeddings.views(), embeddings.num_views) if views else cls(embeddings.images(), 0)

    def take(self, images: npt.NDArray[np.int64], views: npt.NDArray[np.int64]) -> Float16:
        """Return the rows of B samples, float16 [B, D].

        Args:
            images: Their rows among the embeddings, int64 [B].
            views: Which view each shows, int64 [B].
        """
        return self.rows.take(images * self.num_views + views if self.num_views else images)


@dataclasses.dataclass(frozen=True)
class CaptionRows:
    """Embeddings of captions.

    Attributes:
        first: Of each sample's first caption, [N, D].
        further: Of the captions after the first, sample after sample; None where only the first are shown.
        starts: Where each sample's begin in `further`, int64 [N]; None likewise.
    """

    first: Rows
    further: Rows | None = None
    starts: npt.NDArray[np.int64] | None = None

    @classmethod
    def of(cls, embeddings: Embeddings, *, all_captions: bool) -> CaptionRows:
        """Map the rows of the first captions, or of all."""
        if not all_captions:
            return cls(embeddings.texts())
        further = embeddings.caption_counts - 1
        return cls(embeddings.texts(), embeddings.further_captions(), np.cumsum(further) - further)

    def take(self, images: npt.NDArray[np.int64], captions: npt.NDArray[np.int64]) -> Float16:
        """Return the rows of B samples, float16 [B, D].

        Args:
            images: Their rows among the embeddings, int64 [B].
            captions: Which caption each shows, int64 [B], 0 for the first.
        """
        rows = self.first.take(images)
        later = captions > 0
        if self.further is not None and self.starts is not None and later.any():
            rows[later] = self.further.take(self.starts[images[later]] + captions[later] - 1)
        return rows
