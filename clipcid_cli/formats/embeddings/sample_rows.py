"""Embeddings of what samples show: of an image or one of its views, of its first caption or a later one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from clipcid_cli.formats.embeddings.folder import Embeddings
from clipcid_cli.formats.embeddings.rows import Float16, Rows
from clipcid_cli.formats.key_streams import KeyStream, Values


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
    """

    first: Rows
    further: Rows | None = None

    @classmethod
    def of(cls, embeddings: Embeddings, *, all_captions: bool) -> CaptionRows:
        """Map the rows of the first captions, or of all."""
        return cls(embeddings.texts(), embeddings.further_captions() if all_captions else None)

    def take(
        self, images: npt.NDArray[np.int64], captions: npt.NDArray[np.int64], starts: npt.NDArray[np.int64]
    ) -> Float16:
        """Return the rows of B samples, float16 [B, D].

        Args:
            images: Their rows among the embeddings, int64 [B].
            captions: Which caption each shows, int64 [B], 0 for the first.
            starts: Where the further captions of each begin, int64 [B].
        """
        rows = self.first.take(images)
        later = captions > 0
        if self.further is not None and later.any():
            rows[later] = self.further.take(starts[later] + captions[later] - 1)
        return rows


def sample_keys(embeddings: Embeddings) -> tuple[KeyStream, int]:
    """Read the keys of embeddings with the numbers of each row, one file in memory at a time.

    Returns:
        The stream, and how many numbers a key has: its row; where captions after the first are embedded, also the first row
        of its own among them, and how many captions it has.
    """

    def read() -> Iterator[tuple[pa.Array, Values]]:
        further = 0
        for file in embeddings.files:
            columns = [np.arange(file.first, file.first + file.rows, dtype=np.int64)]
            if embeddings.has_further_captions:
                counts = file.extras.read_counts(file.metadata, file.rows)
                ends = further + np.cumsum(counts - 1)
                columns += [ends - (counts - 1), counts]
                further = int(ends[-1]) if len(ends) else further
            yield embeddings.keys_of(file).combine_chunks(), np.stack(columns, axis=1)

    return read, 3 if embeddings.has_further_captions else 1
