"""The report of `balance`: how much is kept where, how large the sets are, and what some of them look like."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from markupsafe import Markup

from clipcid_cli.algorithms.distances import IntArray
from clipcid_cli.algorithms.forest import Curve, Edges
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.atomic import write_text
from clipcid_cli.formats.embeddings import Embeddings
from clipcid_cli.formats.report import PALETTE, make_figure, render_report, svg, thumbnail
from clipcid_cli.formats.skips import REASONS
from clipcid_cli.runtime.images import UnreadableImage, decode_image
from clipcid_cli.steps.balance_sets import Sets
from clipcid_cli.steps.forest_search import Survey
from clipcid_cli.steps.sample_finder import SampleFinder, open_data
from clipcid_cli.steps.settings.balance import BalanceSettings

_SETS_SHOWN = 12
_IMAGES_SHOWN = 12
_PAIRS_SHOWN = 6
_THUMBNAIL = 96


@dataclasses.dataclass(frozen=True)
class Picture:
    """One image of the gallery.

    Attributes:
        key: Its key.
        source: Its thumbnail as a ``data:`` URL; empty where it cannot be shown.
        kept: Whether it is the one that stands for its set.
        distance: Its distance to that one.
    """

    key: str
    source: str
    kept: bool
    distance: float


def write_report(
    path: Path,
    settings: BalanceSettings,
    embeddings: Embeddings,
    survey: Survey,
    forest: Edges,
    sets: Sets,
    result: dict[str, Any],
    warnings: list[str],
) -> None:
    """Write the report as one page.

    Args:
        path: Where to.
        settings: Settings of `balance`.
        embeddings: The embeddings.
        survey: Their rows.
        forest: The forest, ascending.
        sets: The sets.
        result: The step's JSON object.
        warnings: What the user was warned of.
    """
    shown = [_choose_members(sets, label) for label in _largest(sets)]
    inside, outside = _around(forest, sets.threshold)
    rows = np.unique(np.concatenate([np.empty(0, np.int64), *shown, inside.a, inside.b, outside.a, outside.b]))
    pictures, why_no_images = _load_pictures(settings, embeddings, survey, sets, rows)
    write_text(
        path,
        render_report(
            "balance.html",
            result=result,
            rule=_describe_rule(settings),
            warnings=warnings,
            num_sets=int(np.count_nonzero(np.bincount(sets.labels) > 1)),
            curve_figure=_draw_curve(sets.curve, len(sets.labels), sets.threshold, sets.num_kept),
            size_figure=_draw_sizes(sets),
            sets=[
                {"size": int(sets.sizes[members[0]]), "images": [pictures[row] for row in members.tolist()]}
                for members in shown
            ],
            inside=_pair_up(inside, pictures),
            outside=_pair_up(outside, pictures),
            with_images=not why_no_images,
            why_no_images=why_no_images,
            reasons=REASONS,
            embeddings=str(embeddings.folder),
        ),
    )


def _describe_rule(settings: BalanceSettings) -> str:
    if settings.keep is not None:
        amount = f"--keep {settings.keep:g}"
    elif settings.threshold is not None:
        amount = f"--threshold {settings.threshold:g}"
    else:
        amount = f"--cosine-distance {settings.cosine_distance:g}"
    return f"{amount} --linkage {settings.linkage} --select {settings.select}"


def _largest(sets: Sets) -> list[int]:
    """Return the labels of the largest sets of two or more images, the largest first, ties by row."""
    sizes = np.bincount(sets.labels)
    order = np.lexsort((np.arange(len(sizes)), -sizes))[:_SETS_SHOWN]
    return [int(label) for label in order if sizes[label] > 1]


def _choose_members(sets: Sets, label: int) -> IntArray:
    """Return the kept image and then others by distance: all of a small set, both ends of a large one."""
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
    """Put pictures beside each other; neither is framed, since a pair is not about which is kept."""
    plain = {row: dataclasses.replace(picture, kept=False) for row, picture in pictures.items()}
    return [
        {"a": plain[a], "b": plain[b], "distance": distance}
        for a, b, distance in zip(edges.a.tolist(), edges.b.tolist(), edges.weight.tolist(), strict=True)
    ]


def _load_pictures(
    settings: BalanceSettings, embeddings: Embeddings, survey: Survey, sets: Sets, rows: IntArray
) -> tuple[dict[int, Picture], str]:
    """Load the thumbnails of some rows; without the data there are keys only, and a sentence that says why."""
    numbers = pa.array(survey.readable[rows])
    keys = embeddings.keys.take(numbers).to_pylist()
    shards = embeddings.shards.take(numbers).to_pylist()
    finder, why = None, ""
    try:
        data = open_data(settings, embeddings)
        finder = None if data is None else SampleFinder(data)
        why = "nothing says which data the embeddings were made of." if data is None else ""
    except ClipcidError as error:
        why = error.message
    pictures = {}
    for row, key, shard in zip(rows.tolist(), keys, shards, strict=True):
        source = "" if finder is None else _thumbnail(finder, shard, key)
        kept = bool(sets.representatives[row] == row)
        pictures[row] = Picture(key, source, kept, float(sets.distances[row]))
    return pictures, why


def _thumbnail(finder: SampleFinder, shard: str, key: str) -> str:
    sample = finder.find(shard, key)
    if sample is None:
        return ""
    try:
        return thumbnail(decode_image(sample.image.read(), draft_size=(_THUMBNAIL, _THUMBNAIL)), _THUMBNAIL)
    except (OSError, UnreadableImage):
        return ""


def _draw_curve(curve: Curve, num_images: int, threshold: float | None, num_kept: int) -> Markup:
    figure = make_figure()
    axes = figure.add_subplot()
    distances = np.concatenate([[0.0], curve.distance])
    kept = np.concatenate([[num_images], curve.kept]) / num_images
    axes.step(distances, kept, where="post", color=PALETTE[0])
    if threshold is not None:
        axes.plot([threshold], [num_kept / num_images], "o", color=PALETTE[1])
        axes.annotate(
            f"{num_kept / num_images:.1%} at {threshold:.4f}",
            (threshold, num_kept / num_images),
            xytext=(-8, -14),
            textcoords="offset points",
            horizontalalignment="right",
        )
    axes.set(xlabel="cut-off ε", ylabel="share kept", ylim=(0, 1.02))
    _lighten(axes.spines.values())
    return svg(figure, "Share of images kept over the cut-off")


def _draw_sizes(sets: Sets) -> Markup:
    """Draw how many images lie in sets of which size, sizes by powers of two."""
    sizes = np.bincount(sets.labels)
    sizes = sizes[sizes > 0]
    power = np.ceil(np.log2(sizes)).astype(np.int64)
    images = np.bincount(power, weights=sizes)
    names = ["1", "2"] + [f"{2 ** (p - 1) + 1}–{2**p}" for p in range(2, len(images))]
    figure = make_figure(height=2.6)
    axes = figure.add_subplot()
    axes.bar(names[: len(images)], images, color=PALETTE[0])
    axes.set(xlabel="images in the set", ylabel="images in such sets")
    axes.tick_params(axis="x", labelrotation=30)
    _lighten(axes.spines.values())
    return svg(figure, "Images by the size of their set")


def _lighten(spines: Iterable[Any]) -> None:
    for spine in spines:
        spine.set_alpha(0.4)
