"""How many sets or clusters there are of each size."""

from __future__ import annotations

from typing import Any

import numpy as np

from clipcid_cli.algorithms.near.exact import IntArray
from clipcid_cli.steps.balance.filters.cluster_cap import ClusterCap


def compare_sizes(cap: ClusterCap) -> list[dict[str, Any]]:
    """Count clusters and their images, before and after the cap, by size before: powers of two, those that occur."""
    before, after = (sizes[cap.before > 0] for sizes in (cap.before, cap.after))
    power = np.ceil(np.log2(before)).astype(np.int64)
    rows = count_sizes(before)
    left = np.bincount(power, weights=after)
    return [row | {"after": int(left[p])} for row, p in zip(rows, np.unique(power).tolist(), strict=True)]


def count_sizes(sizes: IntArray) -> list[dict[str, Any]]:
    """Count sets and the images in them by size, int64 [S], sizes by powers of two, those that occur."""
    power = np.ceil(np.log2(sizes)).astype(np.int64)
    num_sets, images = np.bincount(power), np.bincount(power, weights=sizes).astype(np.int64)
    names = ["1", "2", *(f"{2 ** (p - 1) + 1:,}–{2**p:,}" for p in range(2, len(images)))]
    return [
        {"name": name, "sets": int(number), "images": int(count), "share": count / images.max()}
        for name, number, count in zip(names, num_sets, images, strict=False)
        if number
    ]
