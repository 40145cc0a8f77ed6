"""Pairs of an image and the reference image near it, as the report shows them."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from clipcid_cli.algorithms.near.exact import IntArray
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.dataset import Dataset, names_command, open_described
from clipcid_cli.formats.embeddings.folder import Embeddings
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.steps.balance.context import Context
from clipcid_cli.steps.balance.filters.against import NearReferences
from clipcid_cli.steps.balance.rows import take_texts
from clipcid_cli.steps.balance.samples import SampleFinder, read_thumbnails

_PAIRS_SHOWN = 12


@dataclasses.dataclass(frozen=True)
class Side:
    """One image of a pair.

    Attributes:
        source: Its thumbnail as a ``data:`` URL; empty where it cannot be shown.
    """

    key: str
    source: str


def show_near(near: NearReferences, context: Context, data: Dataset | None, side: int) -> list[dict[str, Any]]:
    """Choose some pairs of each reference, from the nearest to the farthest, and load their images.

    Args:
        data: The data that is balanced, where it can be opened.
        side: Largest width and height of a thumbnail in pixels.

    Returns:
        For each reference its ``name``, the ``number`` of images dropped for it, and the ``pairs``: ``image``, ``reference``
        and ``distance``.
    """
    shown = []
    for number, reference in enumerate(near.references):
        rows = np.flatnonzero(near.owner == number)
        rows = rows[np.argsort(near.distance[rows], kind="stable")]
        chosen = (
            rows[np.unique(np.linspace(0, len(rows) - 1, _PAIRS_SHOWN).round().astype(np.int64))] if len(rows) else rows
        )
        ours = _load(data, context.embeddings, context.filters.everything.numbers[chosen], side)
        source = _open_data(reference.embeddings, WorkDirectory(context.settings.work))
        theirs = _load(source, reference.embeddings, near.row[chosen], side)
        pairs = [
            {"image": image, "reference": other, "distance": distance}
            for image, other, distance in zip(ours, theirs, near.distance[chosen].tolist(), strict=True)
        ]
        shown.append({"name": reference.name, "number": len(rows), "pairs": pairs})
    return shown


def _open_data(embeddings: Embeddings, work: WorkDirectory) -> Dataset | None:
    """Open the images of a reference, where its embeddings record them and they are still there."""
    if embeddings.sidecar is None or names_command(embeddings.sidecar.data.spec):
        return None
    try:
        return open_described(embeddings.sidecar.data, index_root=work.indexes)
    except ClipcidError:
        return None


def _load(data: Dataset | None, embeddings: Embeddings, numbers: IntArray, side: int) -> list[Side]:
    """Load the keys and thumbnails of some rows of embeddings, in their order."""
    keys, shards = (take_texts(embeddings, read, numbers) for read in (embeddings.keys_of, embeddings.shards_of))
    if data is None:
        return [Side(key, "") for key in keys]
    return [
        Side(key, source)
        for key, (source, _) in zip(keys, read_thumbnails(SampleFinder(data), shards, keys, side), strict=True)
    ]
