"""Pictures of rows of embeddings, as far as the data that these were made from can be read."""

from __future__ import annotations

import dataclasses
from contextlib import suppress

from clipcid_cli.algorithms.near.exact import IntArray
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.dataset import Dataset
from clipcid_cli.formats.data.samples import Sample
from clipcid_cli.formats.embeddings.folder import Embeddings
from clipcid_cli.formats.reading import describe
from clipcid_cli.formats.report import thumbnail
from clipcid_cli.formats.skips import REASONS
from clipcid_cli.runtime.models.decode import SkippedImage, decode_image
from clipcid_cli.steps.balance.rows import take_texts
from clipcid_cli.steps.balance.samples import SampleFinder, open_data, open_recorded
from clipcid_cli.steps.settings.balance import BalanceSettings

_SIDE = 96
_UNKNOWN = "it is not recorded which data the embeddings were made from."


@dataclasses.dataclass
class Picture:
    """One image: its thumbnail as a ``data:`` URL, empty where it cannot be shown; its distance to the representative."""

    key: str
    source: str
    kept: bool = False
    distance: float = 0.0


class Gallery:
    """Loads pictures.

    Attributes:
        data: The data; None where it is not known, or cannot be opened.
        closed: Why there is none.
        shown: Number of pictures loaded.
        unread: Why others could not be, by shard and key.
    """

    def __init__(self, settings: BalanceSettings, embeddings: Embeddings, *, recorded: bool = False) -> None:
        """Open the data, or that alone which the embeddings record."""
        self._embeddings = embeddings
        self.data: Dataset | None = None
        self.shown = 0
        self.unread = dict[tuple[str, str], str]()
        try:
            self.data = open_recorded(settings, embeddings) if recorded else open_data(settings, embeddings)
            self.closed = _UNKNOWN if self.data is None else ""
        except ClipcidError as error:
            self.closed = error.message

    def load(self, numbers: IntArray) -> list[Picture]:
        """Load the thumbnails of n rows of the embeddings; without the data there are keys only."""
        embeddings = self._embeddings
        shards, keys = (take_texts(embeddings, read, numbers) for read in (embeddings.shards_of, embeddings.keys_of))
        sources = self.read(shards, keys)
        return [Picture(key, source) for key, source in zip(keys, sources, strict=True)]

    def read(self, shards: list[str], keys: list[str]) -> list[str]:
        """Return thumbnails as ``data:`` URLs, empty where there is none."""
        if self.data is None:
            if self.closed != _UNKNOWN:
                self.unread |= dict.fromkeys(zip(shards, keys, strict=True), self.closed)
            return [""] * len(keys)
        finder = SampleFinder(self.data)
        found: list[Sample | None] | None = None
        if finder.searches_all(shards):  # once for all of them
            with suppress(ClipcidError, OSError):  # which each picture says again
                found = finder.find(shards, keys)
        sources = [""] * len(keys)
        for number, (shard, key) in enumerate(zip(shards, keys, strict=True)):
            where = f"shard {shard}"
            try:
                sample = finder.find([shard], [key])[0] if found is None else found[number]
                if sample is None:
                    self.unread[shard, key] = f"the data has no image {key}."
                    continue
                where = sample.image.path
                image = decode_image(sample.image.read(), draft_size=(_SIDE, _SIDE))
                if isinstance(image, SkippedImage):
                    self.unread[shard, key] = f"{where} has an {REASONS[image.reason]}, {key}."
                    continue
                sources[number] = thumbnail(image, _SIDE)
                self.shown += 1
            except ClipcidError as error:
                self.unread[shard, key] = error.message
            except OSError as error:
                self.unread[shard, key] = f"{error.filename or where} cannot be read: {describe(error)}."
        return sources
