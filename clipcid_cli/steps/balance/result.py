"""The JSON objects of `balance`. What was not asked for, or is not computed, is null."""

from __future__ import annotations

import msgspec
from msgspec import field


def _null() -> None:
    """Return the default of a field that is in the JSON object also where it is null: other defaults are left out."""


class ComparedLinkageResult(msgspec.Struct):
    """What a linkage that was not chosen keeps at the same threshold."""

    linkage: str
    kept: int
    uncovered_ratio: float


class Audit(msgspec.Struct):
    """An estimate of what a search in partitions missed: of all kept images some are sampled and compared with all."""

    sampled: int
    kept: int
    near: int  # sampled images that have another kept image within the threshold
    # The 95 % interval, up to `high`, of their rate among all kept images; the rate itself where all were sampled.
    low: float
    high: float
    rate: float


class ReferenceResult(msgspec.Struct):
    """One reference: its rows, the images near one of them, and those for which it is the nearest reference."""

    name: str
    rows: int
    near: int
    nearest: int


class AgainstResult(msgspec.Struct):
    """What references drop."""

    threshold: float
    dropped: int
    references: list[ReferenceResult]


class NearResult(msgspec.Struct):
    """What targets leave of the images that other filters have left."""

    threshold: float
    kept: int
    dropped: int
    references: list[ReferenceResult]


class CaptionWindowResult(msgspec.Struct):
    """The ends of the window of caption similarity, and how many images lie where; some are without a usable caption."""

    min: float | None
    max: float | None
    inside: int
    below: int
    above: int
    without: int


class ClusterCapResult(msgspec.Struct):
    """The clusters of the images that repeats have left: of each at most so many stay; those capped had more."""

    most: int
    clusters: int
    capped: int
    dropped: int
    largest: int


class WrittenResult(msgspec.Struct):
    """The kept samples written for training: how many, and how many not, since the data does not have them."""

    written: int
    not_written: int


class BalanceResult(msgspec.Struct, omit_defaults=True, kw_only=True):
    """What was kept."""

    images: int
    searched: int  # the images that filters have left
    kept: int
    keep_ratio: float
    threshold: float | None
    components: int  # the sets of the searched images, of each of which one is kept before clusters are capped
    largest_component: int
    uncovered_ratio: float  # share of the dropped repeats that are farther than the threshold from their representative
    other_linkage: ComparedLinkageResult | None  # that with which the chosen one is compared
    neighbors: str
    audit: Audit | None
    # Images by ``reference, caption, repeat, cluster`` and, of ``--near``, ``far``, each once.
    dropped_by: dict[str, int]
    against: AgainstResult | None = field(default_factory=_null)
    caption_window: CaptionWindowResult | None = field(default_factory=_null)
    cluster_cap: ClusterCapResult | None = field(default_factory=_null)
    skipped: dict[str, int]  # samples by reason
    seconds: dict[str, float]  # ``embed, search, write`` and, of partitioned neighbours, ``audit``
    near: NearResult | None = None
    # Of ``--write-shards`` and ``--write-data``; the sidecar holds the result without them.
    shards: WrittenResult | None = None
    data: WrittenResult | None = None
    files: dict[str, str] = {}  # the path of each file by its name; the sidecar holds the result without them

    @property
    def is_filtered(self) -> bool:
        """Whether images could be dropped that repeat no other."""
        counts = self.against, self.caption_window, self.near, self.cluster_cap
        return counts != (None, None, None, None)


class SearchCost(msgspec.Struct):
    """What a search would take."""

    pairs: int
    flop: int


class ReferenceCost(msgspec.Struct):
    """What a reference would take, and first its embedding where it has none."""

    name: str
    rows: int
    to_embed: bool
    embed_seconds: float
    pairs: int


class CaptionCost(msgspec.Struct):
    """What a caption window would leave: how many images were sampled, and the share inside."""

    sampled: int
    inside: float

    @property
    def share(self) -> float:
        """The share of images inside; where none of those sampled is, the most at 95 % confidence."""
        return self.inside or min(1.0, 3.0 / self.sampled)


class MemoryCost(msgspec.Struct, omit_defaults=True):
    """Bytes of mapped files, of a process without them, and of its GPU."""

    mapped: int
    resident: int
    device: int = 0  # on a CPU none


class BalanceCost(msgspec.Struct, omit_defaults=True, kw_only=True):
    """What a new search would take; pairs and flop are those of ``neighbors``."""

    images: int
    # Fewer than all images where a caption window or --near-keep drops some; the most they may be where the window drops all
    # that were sampled. What references drop within a distance is not known.
    searched: int
    width: int
    neighbors: str
    pairs: int
    flop: int
    exact: SearchCost
    partitioned: SearchCost
    against: list[ReferenceCost] | None = field(default_factory=_null)
    caption_window: CaptionCost | None = field(default_factory=_null)
    clustered_images: int | None = field(default_factory=_null)
    memory: MemoryCost
    disk: int  # bytes
    near: list[ReferenceCost] | None = None

    @property
    def references(self) -> list[tuple[str, ReferenceCost]]:
        """All references, each with the name of what it is compared for."""
        against = [("against", cost) for cost in self.against or []]
        near = [("near", cost) for cost in self.near or []]
        return against + near
