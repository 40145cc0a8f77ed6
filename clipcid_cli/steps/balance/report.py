"""The report of `balance`: how much is kept at each cut-off, how large the sets are, and what some of them look like."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from clipcid_cli.algorithms.near.edges import Edges
from clipcid_cli.algorithms.near.exact import IntArray
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.atomic import write_text
from clipcid_cli.formats.data.dataset import Dataset
from clipcid_cli.formats.embeddings.folder import Embeddings
from clipcid_cli.formats.report import PALETTE, make_figure, render_report, svg
from clipcid_cli.formats.results.sets import SetTable
from clipcid_cli.formats.sidecar import BalanceSidecar
from clipcid_cli.formats.skips import REASONS
from clipcid_cli.steps.balance.compare_linkage import OtherLinkage
from clipcid_cli.steps.balance.composition import compare_classes
from clipcid_cli.steps.balance.context import Context
from clipcid_cli.steps.balance.filters.captions import draw_window
from clipcid_cli.steps.balance.filters.cluster_cap import ClusterCap
from clipcid_cli.steps.balance.filters.keep_rows import KeepRows
from clipcid_cli.steps.balance.pairs import NotComputed
from clipcid_cli.steps.balance.result import describe_rule, explain_unread
from clipcid_cli.steps.balance.rows import take_texts
from clipcid_cli.steps.balance.samples import SampleFinder, open_data, read_thumbnails
from clipcid_cli.steps.balance.sections.chains import find_chains
from clipcid_cli.steps.balance.sections.reference_pairs import show_near
from clipcid_cli.steps.balance.sections.sizes import compare_sizes, count_sizes
from clipcid_cli.steps.balance.sets import Sets
from clipcid_cli.steps.settings.balance import LINKAGES, BalanceSettings

_SETS_SHOWN = 12
_IMAGES_SHOWN = 9
_PAIRS_SHOWN = 8
_THUMBNAIL = 96
_UNKNOWN = "it is not recorded which data the embeddings were made from."


@dataclasses.dataclass(frozen=True)
class Picture:
    """One image of the gallery.

    Attributes:
        source: Its thumbnail as a ``data:`` URL; empty where it cannot be shown.
        kept: Whether it is kept.
        distance: Its distance to the representative.
    """

    key: str
    source: str
    kept: bool
    distance: float


def write_report(
    path: Path,
    context: Context,
    forest: Edges,
    sets: Sets,
    listed: KeepRows,
    measured: SetTable,
    cap: ClusterCap | None,
    other: OtherLinkage | NotComputed,
    result: dict[str, Any],
    warnings: list[str],
) -> dict[str, Any]:
    """Write the report as one page.

    Args:
        forest: The forest, ascending.
        listed: The rows of the keep list.
        measured: How wide the sets are.
        cap: What was dropped of crowded clusters.
        other: What the other linkage would keep.
        result: The JSON object.
        warnings: What the user was warned of.

    Returns:
        For the sidecar, which pictures are in it: ``{"shown": number, "unread": [[shard, key], …], "why": reason}``.
    """
    settings, embeddings = context.settings, context.embeddings
    near, captions = context.filters.near, context.filters.captions
    sizes = np.bincount(sets.labels)
    largest = _largest(sizes)
    shown = [_choose_members(sets, label) for label in largest]
    inside, outside = _around(forest, sets.threshold)
    chains = find_chains(context, sets, measured)
    chained = [[chain.representative, chain.farthest, *chain.stars] for chain in chains]
    rows = np.unique(
        np.concatenate([np.empty(0, np.int64), *shown, *chained, inside.a, inside.b, outside.a, outside.b])
    )
    data, closed = _open_data(settings, embeddings)
    pictures, unread = _load_pictures(data, closed, context, sets, listed, rows)
    read = 0 if data is None else len(pictures) - len(unread)
    gallery = {"shown": read, "unread": list(unread), "why": next(iter(unread.values()), "")}
    write_text(
        path,
        render_report(
            "balance.html",
            result=result,
            rule=describe_rule(settings),
            linkage=settings.linkage,
            warnings=[*warnings, *explain_unread(gallery)],
            num_sets=int(np.count_nonzero(sizes > 1)),
            why_no_other=other.reason if isinstance(other, NotComputed) else "",
            curve_figure=_draw_curves(sets, settings.linkage, other),
            sizes=count_sizes(sizes[sizes > 0]),
            sets=[
                {"size": int(sizes[label]), "images": [pictures[row] for row in members.tolist()]}
                for label, members in zip(largest, shown, strict=True)
            ],
            chains=[
                {
                    "set": chain,
                    "ends": [pictures[chain.representative], pictures[chain.farthest]],
                    "stars": [pictures[row] for row in chain.stars],
                }
                for chain in chains
            ],
            inside=_pair_up(inside, pictures),
            outside=_pair_up(outside, pictures),
            why_no_images=closed or (_UNKNOWN if data is None else ""),
            classes=compare_classes(data, embeddings, context.filters.everything, listed.kept),
            cluster_sizes=[] if cap is None else compare_sizes(cap),
            near=[] if near is None else show_near(near, context, data, _THUMBNAIL),
            window_figure=None if captions is None else draw_window(captions),
            reasons=REASONS,
            embeddings=str(embeddings.folder),
        ),
    )
    return gallery


def has_new_pictures(settings: BalanceSettings, embeddings: Embeddings, finished: BalanceSidecar | None) -> bool:
    """Tell whether a picture can be read now that the report of a finished output could not show."""
    unread = [] if finished is None else finished.pictures.unread
    data = _open_data(settings, embeddings)[0] if unread else None
    if data is None:
        return False
    shards, keys = ([entry[column] for entry in unread] for column in (0, 1))
    return any(source for source, _ in read_thumbnails(SampleFinder(data), shards, keys, _THUMBNAIL))


def _largest(sizes: IntArray) -> list[int]:
    """Return the labels of the largest sets of two or more images, the largest first, ties by row."""
    labels = np.flatnonzero(sizes > 1)
    if len(labels) > _SETS_SHOWN:
        labels = labels[sizes[labels] >= np.partition(sizes[labels], -_SETS_SHOWN)[-_SETS_SHOWN]]
    order = np.lexsort((labels, -sizes[labels]))[:_SETS_SHOWN]
    return [int(label) for label in labels[order]]


def _choose_members(sets: Sets, label: int) -> IntArray:
    """Return the kept image and then others by distance: all of a small set, the nearest and farthest of a large one."""
    members = np.flatnonzero(sets.labels == label)
    is_kept = sets.representatives[members] == members
    members = members[np.lexsort((members, sets.distances[members], ~is_kept))]
    if len(members) > _IMAGES_SHOWN:
        half = _IMAGES_SHOWN // 2
        members = np.concatenate([members[:half], members[-half:]])
    return members


def _around(forest: Edges, threshold: float | None) -> tuple[Edges, Edges]:
    """Return the last forest edges within the cut-off and the first beyond it."""
    if threshold is None:
        return Edges.empty(), forest[:_PAIRS_SHOWN]
    end = len(forest.up_to(threshold))
    return forest[max(0, end - _PAIRS_SHOWN) : end], forest[end : end + _PAIRS_SHOWN]


def _pair_up(edges: Edges, pictures: dict[int, Picture]) -> list[dict[str, Any]]:
    """Pair the pictures of the two ends of each edge."""
    return [
        {"a": pictures[a], "b": pictures[b], "distance": distance}
        for a, b, distance in zip(edges.a.tolist(), edges.b.tolist(), edges.weight.tolist(), strict=True)
    ]


def _open_data(settings: BalanceSettings, embeddings: Embeddings) -> tuple[Dataset | None, str]:
    """Open the data the embeddings were made from, or return why it cannot be; "" where it is not known which it is."""
    try:
        return open_data(settings, embeddings), ""
    except ClipcidError as error:
        return None, error.message


def _load_pictures(
    data: Dataset | None, closed: str, context: Context, sets: Sets, listed: KeepRows, rows: IntArray
) -> tuple[dict[int, Picture], dict[tuple[str, str], str]]:
    """Load the thumbnails of some rows; without the data there are keys only.

    Returns:
        The pictures by row; and why they could not be read, by shard and key.
    """
    embeddings, numbers = context.embeddings, context.rows.numbers[rows]
    keys, shards = (take_texts(embeddings, read, numbers) for read in (embeddings.keys_of, embeddings.shards_of))
    place = rows if context.rows.positions is None else context.rows.positions[rows]
    is_kept = (listed.representatives[place] == place).tolist()
    thumbnails = [("", closed)] * len(keys)
    if data is not None:
        thumbnails = read_thumbnails(SampleFinder(data), shards, keys, _THUMBNAIL)
    pictures, unread = {}, {}
    for row, key, shard, kept, (source, why) in zip(rows.tolist(), keys, shards, is_kept, thumbnails, strict=True):
        if why:
            unread[shard, key] = why
        pictures[row] = Picture(key, source, kept, float(sets.distances[row]))
    return pictures, unread


def _draw_curves(sets: Sets, linkage: str, other: OtherLinkage | NotComputed) -> Markup:
    """Draw the share kept over the cut-off, by both linkages where both are known, and the points at the cut-off."""
    num_images = len(sets.labels)
    lines = [(linkage, sets.curve, sets.num_kept)]
    if not isinstance(other, NotComputed):
        lines.append((other.linkage, other.curve, other.kept))
    most_kept = max(num_kept for _, _, num_kept in lines)
    figure = make_figure()
    axes = figure.add_subplot()
    for name, curve, num_kept in lines:
        color = PALETTE[LINKAGES.index(name)]
        distances = np.concatenate([[0.0], curve.distance])
        kept = np.concatenate([[num_images], curve.kept]) / num_images
        # Single linkage is known between two points, stars are not: only that the curve lies between them.
        style: dict[str, Any] = {"drawstyle": "steps-post"} if name == "single" else {}
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
        axes.axvline(sets.threshold, color=PALETTE[4], linewidth=0.8, linestyle=":")
    farthest = max(float(curve.distance[-1]) for _, curve, _ in lines)
    axes.set(xlabel="cut-off ε", ylabel="share kept", xlim=(0, 1.15 * farthest or 1), ylim=(0, 1.02))
    axes.legend(loc="lower left", frameon=False)
    return svg(figure, "Share of images kept over the cut-off")
