"""Embeddings of what samples show: of an image or one of its views; of its first caption, a later one or a variant."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from clipcid_cli.formats.embeddings.folder import Embeddings
from clipcid_cli.formats.embeddings.rows import Float16, Rows
from clipcid_cli.formats.join import Listing, Values


@dataclasses.dataclass(frozen=True)
class ImageRows:
    """Embeddings of images and of their views.

    Attributes:
        whole: Of the images themselves, [N, D], mapped.
        views: Of their views, [N·V, D]; None where none are shown.
        num_views: V.
    """

    whole: Rows
    views: Rows | None = None
    num_views: int = 0

    @classmethod
    def of(cls, embeddings: Embeddings, *, views: bool) -> ImageRows:
        """Map the rows of the images, and those of their views."""
        return cls(embeddings.images(), *((embeddings.views(), embeddings.num_views) if views else ()))

    def take(self, images: npt.NDArray[np.int64], views: npt.NDArray[np.int64]) -> Float16:
        """Return the rows of B samples, float16 [B, D].

        Args:
            images: Their rows among the embeddings, int64 [B].
            views: Which view each shows, int64 [B]; −1 for none of them.
        """
        if self.views is None:
            return self.whole.take(images)
        rows = self.views.take(images * self.num_views + np.maximum(views, 0))
        if (none := views < 0).any():
            rows[none] = self.whole.take(images[none])
        return rows


@dataclasses.dataclass(frozen=True)
class CaptionRows:
    """Embeddings of captions.

    Attributes:
        first: Of each sample's first caption, [N, D].
        further: Of the captions after the first, sample after sample; None where only the first are shown.
        variants: Of variants of the captions, [N·W, D]; None where none are shown.
        num_variants: W.
    """

    first: Rows
    further: Rows | None = None
    variants: Rows | None = None
    num_variants: int = 0

    @classmethod
    def of(cls, embeddings: Embeddings, *, all_captions: bool, variants: bool) -> CaptionRows:
        """Map the rows of the first captions or of all, and those of their variants."""
        further = embeddings.further_captions() if all_captions else None
        shown = (embeddings.variants(), embeddings.num_variants) if variants else ()
        return cls(embeddings.texts(), further, *shown)

    def take(
        self,
        images: npt.NDArray[np.int64],
        captions: npt.NDArray[np.int64],
        starts: npt.NDArray[np.int64],
        variants: npt.NDArray[np.int64],
    ) -> Float16:
        """Return the rows of B samples, float16 [B, D].

        Args:
            images: Their rows among the embeddings, int64 [B].
            captions: Which caption each shows, int64 [B], 0 for the first.
            starts: Where the further captions of each begin, int64 [B].
            variants: Which variant each shows instead, int64 [B]; −1 for none.
        """
        rows = self.first.take(images)
        later = captions > 0
        if self.further is not None and later.any():
            rows[later] = self.further.take(starts[later] + captions[later] - 1)
        varied = variants >= 0
        if self.variants is not None and varied.any():
            rows[varied] = self.variants.take(images[varied] * self.num_variants + variants[varied])
        return rows


def sample_keys(embeddings: Embeddings) -> Listing:
    """List the keys of embeddings, one file in memory at a time.

    The numbers of a key are its row and, where captions after the first are embedded, the first row of its own among them
    and how many captions it has.
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

    return Listing(embeddings.folder, read, 3 if embeddings.has_further_captions else 1)
