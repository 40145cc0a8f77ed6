"""The JSON object of `balance`. What was not asked for, or is not computed, is null."""

from __future__ import annotations

import msgspec
from msgspec import field


def null() -> None:
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
    against: AgainstResult | None = field(default_factory=null)
    caption_window: CaptionWindowResult | None = field(default_factory=null)
    cluster_cap: ClusterCapResult | None = field(default_factory=null)
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
