"""What `balance` has found, counted, and what may surprise in it."""

from __future__ import annotations

import dataclasses

import numpy as np

from clipcid_cli.algorithms.near.edges import Edges
from clipcid_cli.steps.balance.balance_run import BalanceRun
from clipcid_cli.steps.balance.filters.cluster_cap import ClusterCap
from clipcid_cli.steps.balance.pairs import NotComputed
from clipcid_cli.steps.balance.result import Audit, BalanceResult
from clipcid_cli.steps.balance.rows import BoolArray
from clipcid_cli.steps.balance.sets import OtherLinkage, Sets

# A set that holds this share of all images is a chain or a placeholder more often than many copies of one picture.
_LARGE_SET = 0.01


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What is to be written.

    Attributes:
        forest: The forest that the sets were made from, ascending.
        is_kept: Which rows are kept in the end, bool [N].
    """

    sets: Sets
    forest: Edges
    other: OtherLinkage | NotComputed
    cap: ClusterCap | None
    is_kept: BoolArray
    audit: Audit | None


def summarise(run: BalanceRun, found: Outcome) -> BalanceResult:
    """Count what is kept, and what was dropped by what."""
    sets, other, rows = found.sets, found.other, run.rows
    kept = int(np.count_nonzero(found.is_kept))
    near = 0 if run.near is None else int(np.count_nonzero(run.near.is_dropped))
    embedded = {} if run.embeddings.sidecar is None else run.embeddings.sidecar.counts["skipped"]
    return BalanceResult(
        images=len(rows),
        searched=rows.num_searched,
        kept=kept,
        keep_ratio=kept / len(rows),
        threshold=sets.threshold,
        components=sets.num_kept,
        largest_component=sets.largest,
        uncovered_ratio=sets.uncovered_ratio,
        other_linkage=other.result if isinstance(other, OtherLinkage) else None,
        neighbors=run.settings.neighbors,
        audit=found.audit,
        dropped_by={
            "reference": near,
            "caption": len(rows) - rows.num_searched - near,
            "repeat": rows.num_searched - sets.num_kept,
            "cluster": sets.num_kept - kept,
        },
        against=None if run.near is None else run.near.summarise(),
        caption_window=None if run.captions is None else run.captions.summarise(),
        cluster_cap=None if found.cap is None else found.cap.summarise(),
        skipped={**embedded, **run.skips.counts},
        seconds=run.phases(),
    )


def find_warnings(run: BalanceRun, sets: Sets) -> list[str]:
    """Explain what may surprise: ties at the cut-off, copies beyond the target, one very large group."""
    warnings = []
    settings, images, kept = run.settings, run.rows.num_searched, sets.num_kept
    missed = 0 if settings.keep is None else max(1, round(settings.keep * images)) - kept
    if missed > 0:
        cause = (
            f"There are more exact copies than --keep {settings.keep:g} drops images, and all of them are dropped"
            if sets.threshold == 0.0
            else f"Pairs tie at the cut-off {sets.threshold:.6g}, and all of them merge"
        )
        warnings.append(f"{cause}: {kept:,} images are kept, {missed:,} fewer than requested.")
    largest = sets.largest
    if largest > 1 and largest > _LARGE_SET * images:
        advice = "; --linkage star keeps groups compact" if settings.linkage == "single" else ""
        warnings.append(
            f"One group holds {largest:,} of {images:,} images ({largest / images:.1%}). It may be a chain of different "
            f"images, or a placeholder: see the report{advice}."
        )
    return warnings
