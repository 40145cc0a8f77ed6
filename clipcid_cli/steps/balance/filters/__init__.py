"""Filters, which drop images before repeats are searched, or after; what a run does not ask for is not loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from clipcid_cli.steps.settings.balance import BalanceSettings

if TYPE_CHECKING:
    from clipcid_cli.steps.balance.filters.filter import Dropped, Filter
    from clipcid_cli.steps.balance.filters.reference import Reference

# What `identify` of the filters names: all of it is in every sidecar.
_IDENTITY = ("clusters", "against", "against_threshold", "near", "near_distance", "near_keep")


def make_filters(settings: BalanceSettings) -> list[Filter]:
    """Make the filters that the settings ask for, in the order in which they drop images, on the first process."""
    filters: list[Filter] = []
    if settings.against:
        from clipcid_cli.steps.balance.filters.against import Against

        filters.append(Against(settings))
    if settings.has_window:
        from clipcid_cli.steps.balance.filters.captions import Captions

        filters.append(Captions(settings))
    if settings.near:
        from clipcid_cli.steps.balance.filters.near import Near

        filters.append(Near(settings))
    if settings.max_per_cluster is not None:
        from clipcid_cli.steps.balance.filters.cluster_cap import find_clusters

        filters.append(find_clusters(settings))
    return filters


def identify(filters: Sequence[Filter], references: Sequence[Reference]) -> dict[str, Any]:
    """Name what filters read as it decides the output; null for a filter that is not asked for."""
    identity: dict[str, Any] = dict.fromkeys(_IDENTITY)
    for rule in filters:
        identity |= rule.identify(references)
    return identity


def count_dropped(first: Sequence[Dropped], repeats: int, last: Sequence[Dropped]) -> dict[str, int]:
    """Count images by what drops them first, in the order in which it does; `far` only where it is asked for."""
    return {"reference": 0, "caption": 0} | _count(first) | {"repeat": repeats, "cluster": 0} | _count(last)


def _count(filters: Sequence[Dropped]) -> dict[str, int]:
    """Count images by the first of some filters that drops them."""
    counts = dict[str, int]()
    is_dropped = np.zeros((), np.bool_)
    for dropped in filters:
        counts[dropped.reason] = int(np.count_nonzero(dropped.is_dropped & ~is_dropped))
        is_dropped = is_dropped | dropped.is_dropped
    return counts
