"""The pictures of the report of `balance`: thumbnails of images, read from the data by shard and key."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from clipcid_cli.algorithms.near.exact import FloatArray, IntArray
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.addresses import is_remote
from clipcid_cli.formats.data.dataset import Dataset
from clipcid_cli.formats.data.samples import Sample
from clipcid_cli.formats.embeddings.folder import Embeddings
from clipcid_cli.formats.embeddings.manifest import ChangedShards, find_changed_shards
from clipcid_cli.formats.files import describe
from clipcid_cli.formats.report import thumbnail
from clipcid_cli.formats.results.keep_list import BalanceSidecar
from clipcid_cli.formats.skips import REASONS
from clipcid_cli.runtime.models.decode import SkippedImage, decode_image
from clipcid_cli.steps.balance.plan import BalancePlan
from clipcid_cli.steps.balance.samples import SampleFinder, open_as_it_is, open_data, take_texts

# Pixels of the longer side of a picture.
_SIDE = 96
_UNKNOWN = "it is not recorded which data the embeddings were made from."
# Local shards without an index that a report lists to find pictures by key alone: seconds to a minute.
_MAX_LISTED = 128


def has_new_pictures(plan: BalancePlan, finished: BalanceSidecar) -> bool:
    """Tell whether a picture can be read now that the report of a finished output could not show."""
    if not finished.pictures.unread:
        return False
    shards, keys = map(list, zip(*finished.pictures.unread, strict=True))
    return any(ReportPictures(plan).read(shards, keys))


@dataclasses.dataclass
class Picture:
    """One image: its thumbnail as a ``data:`` URL, empty where it cannot be shown; its distance to the representative."""

    key: str
    source: str
    kept: bool = False
    distance: float = 0.0


def pair_up(ones: Iterable[Picture], others: Iterable[Picture], distances: FloatArray) -> list[dict[str, Any]]:
    """Join pictures to pairs, as the template shows them."""
    pairs = zip(ones, others, distances.tolist(), strict=True)
    return [{"a": one, "b": other, "distance": distance} for one, other, distance in pairs]


class ReportPictures:
    """Loads pictures, and counts those shown."""

    def __init__(self, plan: BalancePlan, reference: Embeddings | None = None) -> None:
        """Open the data, or that which the embeddings of a reference record."""
        settings = plan.settings
        self._workers = settings.workers
        self._embeddings = plan.embeddings if reference is None else reference
        self.data: Dataset | None = None  # the data; None where it is not known, or cannot be opened
        self.shown = 0
        self.unread = dict[tuple[str, str], str]()  # why other pictures are not shown, by shard and key
        self.changed: ChangedShards | None = None  # shards that are not as they were embedded
        try:
            if reference is None and settings.data is not None:
                self.data = open_data(settings, plan.embeddings)
            else:
                self.data = open_as_it_is(settings, self._embeddings)
                if self.data is not None:
                    self.changed = find_changed_shards(self._embeddings.folder, self.data)
            self.closed = _UNKNOWN if self.data is None else ""  # why there is none
        except ClipcidError as error:
            self.closed = error.message

    @property
    def unchanged_data(self) -> Dataset | None:
        """The data where all its shards are as they were embedded; else None."""
        return self.data if self.changed is None else None

    def load(self, numbers: IntArray) -> list[Picture]:
        """Load the thumbnails of n rows of the embeddings; without the data there are keys only."""
        embeddings = self._embeddings
        shards = take_texts(embeddings, embeddings.shards_of, numbers)
        keys = take_texts(embeddings, embeddings.keys_of, numbers)
        sources = self.read(shards, keys)
        return [Picture(key, source) for key, source in zip(keys, sources, strict=True)]

    def read(self, shards: list[str], keys: list[str]) -> list[str]:
        """Return thumbnails as ``data:`` URLs, empty where there is none."""
        if self.data is None:
            if self.closed != _UNKNOWN:
                self.unread |= dict.fromkeys(zip(shards, keys, strict=True), self.closed)
            return [""] * len(keys)
        finder = SampleFinder(self.data, self._workers)
        samples: list[Sample | None] | None = None
        if finder.searches_all(shards):  # once for all of them
            try:
                _validate_short(self.data)
                samples = finder.find(shards, keys)
            except (ClipcidError, OSError) as error:
                self.unread |= dict.fromkeys(zip(shards, keys, strict=True), _say_why(error, self.data.spec))
                return [""] * len(keys)
        sources = [""] * len(keys)
        changed = frozenset() if self.changed is None else self.changed.names
        for index, (shard, key) in enumerate(zip(shards, keys, strict=True)):
            if shard in changed:
                self.unread[shard, key] = f"shard {shard} has changed since it was embedded."
                continue
            where = f"shard {shard}"
            try:
                sample = finder.find([shard], [key])[0] if samples is None else samples[index]
                if sample is None:
                    self.unread[shard, key] = f"the data has no image {key}."
                    continue
                where = sample.image.path
                image = decode_image(sample.image.read(), draft_size=(_SIDE, _SIDE))
                if isinstance(image, SkippedImage):
                    self.unread[shard, key] = f"{where} has an {REASONS[image.reason]}, {key}."
                    continue
                sources[index] = thumbnail(image, _SIDE)
                self.shown += 1
            except (ClipcidError, OSError) as error:
                self.unread[shard, key] = _say_why(error, where)
        return sources


def _say_why(error: ClipcidError | OSError, where: str) -> str:
    if isinstance(error, ClipcidError):
        return error.message
    return f"{error.filename or where} cannot be read: {describe(error)}."


def _validate_short(data: Dataset) -> None:
    """Refuse to list data of many shards, or behind URLs, for a report alone."""
    remote = any(is_remote(shard.file) for shard in data.shards)
    if data.index is None and (remote or len(data.shards) > _MAX_LISTED):
        raise ClipcidError(
            f"{data.spec} has no index yet, which distill and --select resolution make, and its {len(data.shards):,} shards "
            "are not listed for a report alone.",
            "Run one of these first.",
        )
