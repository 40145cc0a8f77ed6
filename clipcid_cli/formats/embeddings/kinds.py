"""The kinds of rows that embeddings have, by the names of their folders."""

from __future__ import annotations

import enum
from typing import Any

import numpy as np

METADATA = "metadata"
COUNTS_COLUMN = "captions"


class Kind(enum.StrEnum):
    """What rows are of; the value is the name of their folder, and the file of a shard is ``<kind>/<kind>_0000.npy``.

    Row i of every kind belongs to row i of ``metadata/metadata_0000.parquet``, whose columns are ``key``, ``shard``,
    ``caption`` and, where any row has several, ``captions``: how many.

    ``img_emb``, ``text_emb``
        float16 [n, D], unit rows: of the images, and of their first captions.
    ``captions_emb``
        float16 [Σ (captions − 1), D], unit rows: captions after the first, row after row. No file where no row has several.
    ``view_emb``
        float16 [n, V, D], unit rows: V augmented views of each image.
    ``view_params``
        float32 [n, V, 16], what reproduces each view: left, top, right, bottom of its crop in the image's pixels, then its
        colour map [3, 4] row by row. Where any view mixes two images, [n, V, 34]: these, the weight of the image, the other
        image's row counted from its own (NaN where that has none), and 16 of the other.
    ``variant_emb``
        float16 [n, W, D], unit rows: W variants of each row's captions, whose text follows from captions, key and the seed
        in the sidecar.
    """

    IMAGES = "img_emb"
    TEXTS = "text_emb"
    FURTHER = "captions_emb"
    VIEWS = "view_emb"
    VIEW_PARAMS = "view_params"
    VARIANTS = "variant_emb"

    @property
    def dtype(self) -> np.dtype[Any]:
        """Number format of the files that `embed` writes."""
        return np.dtype(np.float32 if self is Kind.VIEW_PARAMS else np.float16)
