"""The JSON object of a dry run of `balance`."""

from __future__ import annotations

import msgspec
from msgspec import field

from clipcid_cli.steps.balance.result import null


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
    against: list[ReferenceCost] | None = field(default_factory=null)
    caption_window: CaptionCost | None = field(default_factory=null)
    clustered_images: int | None = field(default_factory=null)
    memory: MemoryCost
    disk: int  # bytes
    near: list[ReferenceCost] | None = None

    @property
    def references(self) -> list[tuple[str, ReferenceCost]]:
        """All references, each with the name of what it is compared for."""
        against = [("against", cost) for cost in self.against or []]
        near = [("near", cost) for cost in self.near or []]
        return against + near
