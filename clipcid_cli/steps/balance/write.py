"""What `balance` has found: counted, explained where it may surprise, and written; the sidecar last."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import msgspec
import numpy as np
import pyarrow as pa

from clipcid_cli.algorithms.near.edges import Edges
from clipcid_cli.algorithms.near.exact import BoolArray
from clipcid_cli.algorithms.sets.representatives import find_diameters
from clipcid_cli.formats.arrays import map_strings
from clipcid_cli.formats.embeddings.folder import EmbeddingFile
from clipcid_cli.formats.fingerprint import record
from clipcid_cli.formats.results.forest import CURVE, ROW_FILES, SET_TABLE, SetTable, write_curve, write_set_table
from clipcid_cli.formats.results.keep_list import Column, write_keep_list
from clipcid_cli.formats.work_directory import KEEP_LIST, WorkDirectory
from clipcid_cli.steps import reporting
from clipcid_cli.steps.balance.balance_run import BalanceRun
from clipcid_cli.steps.balance.filters.against import NearReferences, forget_others
from clipcid_cli.steps.balance.filters.captions import CaptionWindow
from clipcid_cli.steps.balance.filters.cluster_cap import ClusterCap
from clipcid_cli.steps.balance.report import write_report
from clipcid_cli.steps.balance.result import Audit, BalanceResult
from clipcid_cli.steps.balance.sets import NotComputed, OtherLinkage, Sets
from clipcid_cli.steps.settings.shared import given_flags

# A set that holds this share of all images is a chain or a placeholder more often than many copies of one picture.
_LARGE_SET = 0.01


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What is to be written: sets, the forest they were made from, …, and which rows are kept in the end, bool [N]."""

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
    """Explain what may surprise: ties at the cut-off, copies beyond the target, one very large set."""
    warnings = []
    settings = run.settings
    images = run.rows.num_searched
    kept = sets.num_kept
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
        advice = "; --linkage star keeps sets compact" if settings.linkage == "single" else ""
        warnings.append(
            f"One set holds {largest:,} of {images:,} images ({largest / images:.1%}). It may be a chain of different "
            f"images, or a placeholder: see the report{advice}."
        )
    return warnings


def write(run: BalanceRun, found: Outcome) -> BalanceResult:
    """Write the output, on the first process; return its result."""
    warnings = find_warnings(run, found.sets)
    for warning in warnings:
        reporting.warn(warning)
    measured = _write_tables(run, found)
    result = summarise(run, found)
    pictures = write_report(run, found, measured, result, warnings)
    result = msgspec.structs.replace(result, seconds=run.phases())
    output = run.output
    output.commit(
        counts={"read": run.embeddings.num_rows, "used": len(run.rows), "skipped": result.skipped},
        seconds=result.seconds,
        outputs=[record(run.work / name, run.work) for name in (KEEP_LIST, ROW_FILES)],
        embeddings=WorkDirectory(run.settings.work).name_of(run.embeddings.folder),
        flags=given_flags(run.settings),
        pictures=pictures,
        result=result,
    )
    if run.near is None:
        forget_others(output.folder)
    return result


def _write_tables(run: BalanceRun, found: Outcome) -> SetTable:
    """Write the tables; return that of the sets."""
    folder, sets = run.work, found.sets

    def map_names(read: Callable[[EmbeddingFile], pa.ChunkedArray]) -> pa.LargeStringArray:
        return map_strings(folder, run.embeddings.take_column(read, run.rows.numbers))

    keys = map_names(run.embeddings.keys_of)
    filters = [each for each in (run.near, run.captions, found.cap) if each is not None]
    columns = [_say_reasons(filters, found.is_kept)] if filters else []
    is_represented = (sets.representatives >= 0) & found.is_kept[sets.representatives]
    write_keep_list(
        folder / KEEP_LIST,
        keys=keys,
        shards=map_names(run.embeddings.shards_of),
        labels=sets.labels,
        representatives=np.where(is_represented, sets.representatives, sets.representatives.dtype.type(-1)),
        distances=sets.distances,
        more=columns + [column for each in filters for column in each.columns(folder)],
    )
    measured = _measure_sets(run, sets)
    write_set_table(folder / SET_TABLE, measured, keys)
    curve = sets.curve
    write_curve(
        folder / CURVE,
        distances=curve.distance,
        kept=curve.kept,
        largest=curve.largest,
        num_images=run.rows.num_searched,
    )
    return measured


def _measure_sets(run: BalanceRun, sets: Sets) -> SetTable:
    """Measure every set of two or more images: its diameter, and the image farthest from the one kept."""
    rows, labels, distances = run.rows, sets.labels, sets.distances
    sizes = np.bincount(labels, minlength=len(labels))
    label = np.flatnonzero(sizes > 1).astype(labels.dtype)
    size = sizes[label]
    del sizes
    reach = np.zeros(len(labels), np.float32)
    np.maximum.at(reach, labels, distances)
    at_reach = np.flatnonzero(distances == reach[labels]).astype(labels.dtype)
    reach = reach[label]
    first = np.full(len(labels), len(labels), labels.dtype)
    np.minimum.at(first, labels[at_reach], at_reach)
    farthest = first[label]
    del at_reach, first
    # Copies are at distance 0 of each other.
    diameter, is_exact = find_diameters(rows.read, rows.unique, labels[rows.unique], label, run.context.device)
    return SetTable(label, size, sets.representatives[label], farthest, reach, diameter, is_exact)


def _say_reasons(filters: Sequence[NearReferences | CaptionWindow | ClusterCap], is_kept: BoolArray) -> Column:
    """Return the column that names by what an image was dropped: the first filter that drops it, else as a repeat."""
    reasons = [*(each.reason for each in filters), "repeat"]
    masks = [each.is_dropped for each in filters]

    def read(part: slice) -> pa.Array:
        number = np.full(part.stop - part.start, len(masks), np.int8)
        for place in reversed(range(len(masks))):
            number[masks[place][part]] = place
        return pa.array(reasons, pa.string()).take(pa.array(number, mask=is_kept[part]))

    return Column("dropped_by", pa.string(), read)
