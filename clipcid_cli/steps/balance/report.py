"""The report of `balance`: what is kept at each cut-off, how large sets are and what some look like, and what changed."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from clipcid_cli.algorithms.near.edges import Edges
from clipcid_cli.algorithms.near.exact import IntArray
from clipcid_cli.formats.files import write_text
from clipcid_cli.formats.report import render_report
from clipcid_cli.formats.skips import REASONS
from clipcid_cli.steps import reporting
from clipcid_cli.steps.balance.balance_run import BalanceRun
from clipcid_cli.steps.balance.chains import find_chains
from clipcid_cli.steps.balance.changes import compare_classes
from clipcid_cli.steps.balance.compute import Outcome
from clipcid_cli.steps.balance.curves import count_sizes, draw_curves
from clipcid_cli.steps.balance.linkages import LINKAGES
from clipcid_cli.steps.balance.pairs import NotComputed
from clipcid_cli.steps.balance.pictures import Picture, ReportPictures, pair_up
from clipcid_cli.steps.balance.result import BalanceResult
from clipcid_cli.steps.balance.sets import Sets
from clipcid_cli.typed import this_command

if TYPE_CHECKING:
    from clipcid_cli.steps.balance.filters.filter import Dropped

REPORT = "report.html"

_SETS_SHOWN = 12
_IMAGES_SHOWN = 9
_PAIRS_SHOWN = 8


def write_report(outcome: Outcome, result: BalanceResult, warnings: list[str]) -> dict[str, Any]:
    """Write the report as one page, with what the user was warned of.

    Returns:
        For the sidecar, which pictures are in it: ``{"shown": number, "unread": [[shard, key], …], "why": reason}``.
    """
    run, sets, compared = outcome.run, outcome.sets, outcome.compared
    table = sets.table
    largest = np.argsort(-table.size, kind="stable")[:_SETS_SHOWN]
    members = [_choose_members(sets, label) for label in table.label[largest].tolist()]
    alone = np.ones(run.rows.num_searched - table.size.sum(), np.int64)
    inside, outside = _pairs_at_cutoff(sets, outcome.forest)
    chains = find_chains(run, sets)
    chained = [np.array(chain["shown"]) for chain in chains]
    gallery = ReportPictures(run)
    shown = np.concatenate([*members, *chained, inside.a, inside.b, outside.a, outside.b])
    pictures = _load_pictures(outcome, gallery, np.unique(shown).astype(sets.labels.dtype))

    def show(edges: Edges) -> list[dict[str, Any]]:
        ones = [pictures[row] for row in edges.a.tolist()]
        others = [pictures[row] for row in edges.b.tolist()]
        return pair_up(ones, others, edges.weight)

    if gallery.changed is not None:
        error = gallery.changed.error
        warning = f"{error.message} The keep list is of the images as they were embedded.\n{error.fix}"
        reporting.warn(warning)
        warnings = [*warnings, warning]
    unread = gallery.unread
    why = next(iter(unread.values()), "")
    if unread:
        warning = (
            f"The report shows {gallery.shown:,} of {gallery.shown + len(unread):,} pictures: {why} Once they can "
            "be read, the same command adds them."
        )
        reporting.warn(warning)
        warnings = [*warnings, warning]
    recorded = {"shown": gallery.shown, "unread": list(unread), "why": why}
    page = render_report(
        "balance.html",
        result=result,
        command=shlex.join(this_command()),
        linkage=run.settings.linkage,
        linkages=LINKAGES,
        warnings=warnings,
        num_sets=len(table),
        why_not_compared=compared.reason if isinstance(compared, NotComputed) else "",
        curve_figure=draw_curves(run, sets, compared),
        sizes=count_sizes(np.concatenate([table.size, alone])),
        sets=[
            {"size": size, "images": [pictures[row] for row in rows.tolist()]}
            for size, rows in zip(table.size[largest].tolist(), members, strict=True)
        ],
        chains=[{"set": chain, "images": [pictures[row] for row in chain["shown"]]} for chain in chains],
        inside=show(inside),
        outside=show(outside),
        why_no_images=gallery.closed,
        classes=compare_classes(gallery.unchanged_data, run.embeddings, run.rows, outcome.is_kept),
        dropped=_list_dropped(outcome, result) if result.is_filtered else [],
        sections=_show_filters(outcome.dropped_first, run, gallery),
        last_sections=_show_filters(outcome.dropped_last, run, gallery),
        reasons=REASONS,
        embeddings=str(run.embeddings.folder),
    )
    write_text(run.work / REPORT, page)
    return recorded


def _pairs_at_cutoff(sets: Sets, forest: Edges) -> tuple[Edges, Edges]:
    """Return the edges of the forest just within the cut-off, and those just beyond it."""
    end = 0 if sets.threshold is None else len(forest.up_to(sets.threshold))
    return forest[max(0, end - _PAIRS_SHOWN) : end], forest[end : end + _PAIRS_SHOWN]


def _list_dropped(outcome: Outcome, result: BalanceResult) -> list[tuple[int, str]]:
    """Return how many images were dropped, and by what, in words, each image once."""
    words = {dropped.reason: dropped.words for dropped in outcome.filters}
    is_rest = result.searched < result.images
    words["repeat"] = f"repeats among the {result.searched:,} left" if is_rest else "repeats"
    return [(count, words[reason]) for reason, count in result.dropped_by.items() if count]


def _show_filters(filters: Sequence[Dropped], run: BalanceRun, gallery: ReportPictures) -> list[tuple[str, Any]]:
    """Return for each filter the name of its section's template, and what that shows."""
    return [(f"balance_{dropped.name}.html", dropped.show(run, gallery)) for dropped in filters]


def _load_pictures(outcome: Outcome, gallery: ReportPictures, rows: IntArray) -> dict[int, Picture]:
    """Load the pictures of some rows; return each by its row."""
    loaded = gallery.load(outcome.run.rows.numbers[rows])
    pictures = dict(zip(rows.tolist(), loaded, strict=True))
    for row, picture in pictures.items():
        picture.kept = bool(outcome.is_kept[row])
        picture.distance = float(outcome.sets.distances[row])
    return pictures


def _choose_members(sets: Sets, label: int) -> IntArray:
    """Return the kept image and then others by distance: all of a small set, the nearest and farthest of a large one."""
    members = np.flatnonzero(sets.labels == label)
    is_kept = sets.representatives[members] == members
    members = members[np.lexsort((members, sets.distances[members], ~is_kept))]
    if len(members) > _IMAGES_SHOWN:
        half = _IMAGES_SHOWN // 2
        members = np.concatenate([members[:half], members[-half:]])
    return members
