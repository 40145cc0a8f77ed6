"""Rows of what samples show: of an image or one of its views; of its first caption, a later one or a variant."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from clipcid_cli.formats.embeddings.folder import Embeddings
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.formats.embeddings.rows import Float16, Rows
from clipcid_cli.formats.join import Listing, Values

Numbers = npt.NDArray[np.int64]


def take_images(rows: Mapping[Kind, Rows], images: Numbers, views: Numbers) -> Float16:
    """Return the rows of what B samples show of their images, float16 [B, D].

    Args:
        rows: Of images, and of views where any are shown.
        images: The samples' rows among the embeddings, int64 [B].
        views: Which view each shows, int64 [B]; −1 for none of them.
    """
    viewed = (views >= 0) & (Kind.VIEWS in rows)
    return _pick(rows, {Kind.IMAGES: (~viewed, images), Kind.VIEWS: (viewed, _place(rows, Kind.VIEWS, images, views))})


def take_captions(
    rows: Mapping[Kind, Rows], images: Numbers, captions: Numbers, starts: Numbers, variants: Numbers
) -> Float16:
    """Return the rows of the captions that B samples show, float16 [B, D].

    Args:
        rows: Of first captions, of further ones where all are shown, and of variants where any are.
        images: The samples' rows among the embeddings, int64 [B].
        captions: Which caption each shows, int64 [B], 0 for the first.
        starts: Where the further captions of each begin, int64 [B].
        variants: Which variant each shows instead, int64 [B]; −1 for none.
    """
    varied = (variants >= 0) & (Kind.VARIANTS in rows)
    later = (captions > 0) & (Kind.FURTHER in rows) & ~varied
    choices = {
        Kind.TEXTS: (~(varied | later), images),
        Kind.FURTHER: (later, starts + captions - 1),
        Kind.VARIANTS: (varied, _place(rows, Kind.VARIANTS, images, variants)),
    }
    return _pick(rows, choices)


def _place(rows: Mapping[Kind, Rows], kind: Kind, images: Numbers, each: Numbers) -> Numbers:
    """Return the places of rows of which each image has several: of which image, and which of its rows."""
    return images * (len(rows[kind]) // len(rows[Kind.IMAGES])) + each if kind in rows else each


def _pick(rows: Mapping[Kind, Rows], choices: Mapping[Kind, tuple[npt.NDArray[np.bool_], Numbers]]) -> Float16:
    """Read the rows of B samples, each from one kind: for which of them, bool [B], and where they are, int64 [B]."""
    first = next(iter(choices))
    found = np.empty((len(choices[first][0]), rows[first].shape[1]), np.float16)
    for kind, (where, places) in choices.items():
        if where.any():
            found[where] = rows[kind].take(places[where])
    return found


def sample_keys(embeddings: Embeddings) -> Listing:
    """List the keys of embeddings, one file in memory at a time.

    The numbers of a key are its row and, where captions after the first are embedded, the first row of its own among them
    and how many captions it has.
    """
    has_further = Kind.FURTHER in embeddings.kinds

    def read() -> Iterator[tuple[pa.Array, Values]]:
        further = 0
        for file in embeddings.files:
            columns = [np.arange(file.first, file.first + file.rows, dtype=np.int64)]
            if has_further:
                counts = embeddings.counts_of(file)
                ends = further + np.cumsum(counts - 1)
                columns += [ends - (counts - 1), counts]
                further = int(ends[-1]) if len(ends) else further
            yield embeddings.keys_of(file).combine_chunks(), np.stack(columns, axis=1)

    return Listing(embeddings.folder, read, 3 if has_further else 1)
