"""What the report of `balance` draws: the share of images kept over the cut-off, and how many sets are of which size."""

from __future__ import annotations

from typing import Any

import numpy as np
from markupsafe import Markup

from clipcid_cli.algorithms.near.exact import IntArray
from clipcid_cli.formats.report import PALETTE, make_figure, svg
from clipcid_cli.steps.balance.balance_run import BalanceRun
from clipcid_cli.steps.balance.compared_linkage import ComparedLinkage
from clipcid_cli.steps.balance.linkages import LINKAGES
from clipcid_cli.steps.balance.pairs import NotComputed
from clipcid_cli.steps.balance.sets import Sets


def draw_curves(run: BalanceRun, sets: Sets, compared: ComparedLinkage | NotComputed) -> Markup:
    """Draw the share kept over the cut-off, with the compared linkage where that is known, and the points at it."""
    num_images, linkage = run.rows.num_searched, run.settings.linkage
    lines = [(linkage, sets.curve, sets.num_kept)]
    if isinstance(compared, ComparedLinkage):
        lines.append((compared.result.linkage, compared.curve, compared.result.kept))
    most_kept = max(num_kept for _, _, num_kept in lines)
    figure = make_figure()
    axes = figure.add_subplot()
    for name, curve, num_kept in lines:
        color = PALETTE[LINKAGES[name].color]
        distances = np.concatenate([[0.0], curve.distance])
        kept = np.concatenate([[num_images], curve.kept]) / num_images
        # Between two points only what follows the forest is known; of others, that the curve lies between them.
        style: dict[str, Any] = {"drawstyle": "steps-post"} if LINKAGES[name].follows_forest else {}
        axes.plot(distances, kept, color=color, label=f"{name} (chosen)" if name == linkage else name, **style)
        if sets.threshold is not None:
            point = (sets.threshold, num_kept / num_images)
            axes.plot(*point, "o", color=color)
            # The number of the upper line is placed above it, that of the lower one below, unless the axis is there.
            place: dict[str, Any] = {"xytext": (4, 5), "horizontalalignment": "left"}
            if (num_kept < most_kept or len(lines) == 1) and point[1] > 0.12:
                place = {"xytext": (-7, -13), "horizontalalignment": "right"}
            axes.annotate(f"{num_kept / num_images:.1%}", point, textcoords="offset points", **place)
    if sets.threshold is not None:
        axes.axvline(sets.threshold, color=PALETTE[-1], linewidth=0.8, linestyle=":")
    farthest = max(float(curve.distance[-1]) for _, curve, _ in lines)
    axes.set(xlabel="cut-off ε", ylabel="share kept", xlim=(0, 1.15 * farthest or 1), ylim=(0, 1.02))
    axes.legend(loc="lower left", frameon=False)
    return svg(figure, "Share of images kept over the cut-off")


def count_sizes(sizes: IntArray, **more: IntArray) -> list[dict[str, Any]]:
    """Count sets and the images in them by size, int64 [S], in powers of two.

    Args:
        more: Other numbers of each set, [S], to be added up likewise.
    """
    is_set = sizes > 0
    power = np.ceil(np.log2(sizes[is_set])).astype(np.int64)
    num_sets = np.bincount(power)
    sums = dict[str, IntArray]()
    for name, values in {"images": sizes, **more}.items():
        sums[name] = np.bincount(power, weights=values[is_set]).astype(np.int64)
    rows = list[dict[str, Any]]()
    for p in np.flatnonzero(num_sets).tolist():
        name = f"{2**p}" if p < 2 else f"{2 ** (p - 1) + 1:,}–{2**p:,}"
        row = {"name": name, "sets": int(num_sets[p]), "share": sums["images"][p] / sums["images"].max()}
        for column, total in sums.items():
            row[column] = int(total[p])
        rows.append(row)
    return rows
