"""What `balance` has found: counted, explained where it may surprise, and written; then the lists for other tools."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clipcid_cli.algorithms.near.exact import IntArray
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.arrays import map_strings
from clipcid_cli.formats.data.samples import Sample
from clipcid_cli.formats.embeddings.folder import Embeddings
from clipcid_cli.formats.embeddings.rows import EmbeddingFile
from clipcid_cli.formats.fingerprint import record
from clipcid_cli.formats.join import join, parquet_listing
from clipcid_cli.formats.results.forest import CURVE, ROW_FILES, SET_TABLE, write_curve, write_set_table
from clipcid_cli.formats.results.keep_list import (
    Column,
    are_uids,
    read_dropped,
    read_keep_list,
    write_keep_list,
    write_keys,
    write_pairs,
    write_uids,
)
from clipcid_cli.formats.sidecar import sidecar_path
from clipcid_cli.formats.skipped import SKIPPED, read_skipped, write_skipped
from clipcid_cli.formats.work_directory import KEEP_LIST, WorkDirectory
from clipcid_cli.steps import reporting
from clipcid_cli.steps.balance.balance_run import BalancePlan, BalanceRun
from clipcid_cli.steps.balance.compute import Outcome
from clipcid_cli.steps.balance.filters.against import forget_others
from clipcid_cli.steps.balance.report import write_report
from clipcid_cli.steps.balance.result import BalanceResult
from clipcid_cli.steps.balance.samples import SampleFinder, open_data, read_uid
from clipcid_cli.steps.balance.sets import OtherLinkage, Sets
from clipcid_cli.steps.balance.write_data import WRITE_DATA
from clipcid_cli.steps.balance.write_shards import WRITE_SHARDS
from clipcid_cli.steps.embeddings import list_bad_rows
from clipcid_cli.steps.settings.balance import BalanceSettings

# A set that holds this share of all images, and so many, is a chain or a placeholder more often than many copies of one
# picture.
_LARGE_SET = 0.01
_MANY_IMAGES = 10
# Rows whose identifiers are looked up together.
_ROWS_AT_ONCE = 4096


def summarise(found: Outcome) -> BalanceResult:
    """Count what is kept, and what was dropped by what."""
    run, sets, other = found.run, found.sets, found.other
    rows = run.rows
    kept = int(np.count_nonzero(found.is_kept))
    near = 0 if found.near is None else int(np.count_nonzero(found.near.is_dropped))
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
        against=None if found.near is None else found.near.summarise(),
        caption_window=None if found.captions is None else found.captions.summarise(),
        cluster_cap=None if found.cap is None else found.cap.summarise(),
        skipped={**embedded, **run.skips.counts},
        seconds=run.phases(),
    )


def find_warnings(run: BalanceRun, sets: Sets) -> list[str]:
    """Explain what may surprise: fewer images than asked for, one very large set."""
    warnings = []
    settings = run.settings
    images = run.rows.num_searched
    kept = sets.num_kept
    missed = 0 if settings.keep is None else max(1, round(settings.keep * images)) - kept
    if missed > 0:
        if sets.threshold == 0.0:
            cause = f"There are more exact copies than --keep {settings.keep:g} would drop, and all of them are dropped"
        elif settings.linkage == "single":
            cause = f"Pairs tie at the cut-off {sets.threshold:.6g}, and all of them merge"
        else:
            cause = f"With stars one more pair may drop several images, as at the cut-off {sets.threshold:.6g}"
        warnings.append(f"{cause}: {kept:,} images are kept, {missed:,} fewer than requested.")
    largest = sets.largest
    if largest >= _MANY_IMAGES and largest > _LARGE_SET * images:
        advice = (
            "It may be a chain of different images, or a placeholder: see the report; --linkage star keeps sets compact."
            if settings.linkage == "single"
            else "It may be a placeholder: see the report."
        )
        warnings.append(f"One set holds {largest:,} of {images:,} images ({largest / images:.1%}). {advice}")
    return warnings


def write(found: Outcome) -> BalanceResult:
    """Write the output, on the first process; return its result."""
    run = found.run
    warnings = find_warnings(run, found.sets)
    for warning in warnings:
        reporting.warn(warning)
    _write_tables(found)
    written = [KEEP_LIST, ROW_FILES]
    if write_skipped(run.work / SKIPPED, _list_skipped(run)):
        written.append(SKIPPED)
    result = summarise(found)
    pictures = write_report(found, result, warnings)
    result = msgspec.structs.replace(result, seconds=run.phases())
    output = run.output
    output.commit(
        counts={"read": run.embeddings.num_rows, "used": len(run.rows), "skipped": result.skipped},
        seconds=result.seconds,
        outputs=[record(run.work / name, run.work) for name in written],
        embeddings=WorkDirectory(run.settings.work).name_of(run.embeddings.folder),
        pictures=pictures,
        result=result,
    )
    if found.near is None:
        forget_others(output.folder)
    return result


def _list_skipped(run: BalanceRun) -> Iterator[pa.Table]:
    """List what was skipped when the embeddings were made, and the rows that are not finite."""
    embeddings = run.embeddings
    if embeddings.sidecar is not None:
        yield from read_skipped(embeddings.folder / SKIPPED)
    if len(run.rows) < embeddings.num_rows:
        is_bad = np.ones(embeddings.num_rows, np.bool_)
        is_bad[run.rows.numbers] = False
        yield from list_bad_rows(embeddings, np.flatnonzero(is_bad))


def _write_tables(found: Outcome) -> None:
    run, sets, filters = found.run, found.sets, found.filters
    folder = run.work

    def map_names(read: Callable[[EmbeddingFile], pa.ChunkedArray]) -> pa.LargeStringArray:
        return map_strings(folder, run.embeddings.take_column(read, run.rows.numbers))

    keys = map_names(run.embeddings.keys_of)
    columns = [_say_reasons(found)] if filters else []
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
    write_set_table(folder / SET_TABLE, sets.table, keys)
    curve = sets.curve
    write_curve(
        folder / CURVE,
        distances=curve.distance,
        kept=curve.kept,
        largest=curve.largest,
        num_images=run.rows.num_searched,
    )


def _say_reasons(found: Outcome) -> Column:
    """Return the column that names by what an image was dropped: the first filter that drops it, else as a repeat."""
    reasons = [*(each.reason for each in found.filters), "repeat"]
    masks = [each.is_dropped for each in found.filters]

    def read(part: slice) -> pa.Array:
        number = np.full(part.stop - part.start, len(masks), np.int8)
        for place in reversed(range(len(masks))):
            number[masks[place][part]] = place
        return pa.array(reasons, pa.string()).take(pa.array(number, mask=found.is_kept[part]))

    return Column("dropped_by", pa.string(), read)


def validate_uids(settings: BalanceSettings, embeddings: Embeddings) -> None:
    """Check that the first sample has an identifier, so that no search is wasted; a dry run keeps no index made for it."""
    if settings.write_uids is None:
        return
    first = next(file for file in embeddings.files if file.rows)
    with tempfile.TemporaryDirectory() as scratch:
        _UidFinder(settings, embeddings, Path(scratch) if settings.dry_run else None).find(first, np.array([0]))


def validate_new(settings: BalanceSettings) -> None:
    """Refuse lists and shards that are there before a search; after it their content is compared."""
    if settings.overwrite:
        return
    for path in (settings.write_uids, settings.write_pairs, settings.write_keys):
        if path is not None and path.exists():
            raise ClipcidError(
                f"{path} already exists, and this run would replace it.",
                "Add --overwrite, or choose another name.",
            )
    for folder in (settings.write_shards, settings.write_data):
        if folder is not None and any(sidecar_path(folder, step).exists() for step in (WRITE_SHARDS, WRITE_DATA)):
            what = "shards" if sidecar_path(folder, WRITE_SHARDS).exists() else "data"
            raise ClipcidError(
                f"{folder} already holds {what}, and this run would replace them.",
                "Add --overwrite, or choose another folder.",
            )


def write_kept(plan: BalancePlan) -> None:
    """Write the lists that the settings name; no search is needed for them."""
    settings, keep_list, overwrite = plan.settings, plan.keep_list, plan.settings.overwrite
    if settings.write_keys is not None:
        write_keys(settings.write_keys, read_keep_list(keep_list).kept_keys(), overwrite=overwrite)
    if settings.write_pairs is not None:
        write_pairs(settings.write_pairs, read_dropped(keep_list), overwrite=overwrite)
    if settings.write_uids is not None:
        num_kept = read_keep_list(keep_list).num_kept
        written = write_uids(settings.write_uids, _kept_uids(plan, num_kept), num_kept, overwrite=overwrite)
        if written < num_kept:
            reporting.warn(f"{num_kept:,} kept images have {written:,} different uids: each is written once.")


def _kept_uids(plan: BalancePlan, num_kept: int) -> Iterator[pa.ChunkedArray]:
    embeddings, keep_list = plan.embeddings, plan.keep_list
    keys = partial(map, embeddings.keys_of, embeddings.files)
    kept = join(keys, embeddings.num_rows, parquet_listing(keep_list, "kept"), keep_list.parent)[:, 0] > 0
    if np.count_nonzero(kept) < num_kept:
        raise ClipcidError(
            f"{keep_list} has keys that {embeddings.folder} does not have: files or shards have been renamed since.",
            "Balance again with --overwrite.",
        )
    finder = _UidFinder(plan.settings, embeddings)
    for file in embeddings.files:
        yield finder.find(file, np.flatnonzero(kept[file.first : file.first + file.rows]))


class _UidFinder:
    """Finds the identifiers of samples: in the embeddings' metadata, else their keys, else in their ``.json``."""

    def __init__(self, settings: BalanceSettings, embeddings: Embeddings, scratch: Path | None = None) -> None:
        """Keep an index that has to be made in the work directory, or in a scratch folder."""
        self._settings = settings
        self._embeddings = embeddings
        self._scratch = scratch

    @cached_property
    def _samples(self) -> SampleFinder | None:
        data = open_data(self._settings, self._embeddings)
        if data is not None and data.index is None and self._scratch is not None:
            data = dataclasses.replace(data, index_folder=self._scratch)
        return None if data is None else SampleFinder(data, self._settings.workers)

    def find(self, file: EmbeddingFile, places: IntArray) -> pa.ChunkedArray:
        """Return those of the rows at some places in a file, n strings of 32 hexadecimal digits."""
        keys = self._embeddings.keys_of(file).take(pa.array(places))
        uids = keys
        if self._embeddings.has_uids:
            stored = self._embeddings.uids_of(file).take(pa.array(places))
            uids = pc.if_else(pa.array(are_uids(stored)), stored, keys.cast(stored.type))
        missing = np.flatnonzero(~are_uids(uids))
        if not len(missing):
            return uids
        found = uids.to_pylist()
        for start in range(0, len(missing), _ROWS_AT_ONCE):
            some = missing[start : start + _ROWS_AT_ONCE]
            samples: list[Sample | None] = [None] * len(some)
            if self._samples is not None:
                samples = self._samples.find_rows(self._embeddings, file.first + places[some])
            for row, sample in zip(some.tolist(), samples, strict=True):
                found[row] = read_uid(sample)
                if found[row] is None:
                    raise ClipcidError(
                        f"Sample {keys[row].as_py()!r} has no uid of DataComp's: its key is not 32 hexadecimal digits, and "
                        "neither the embeddings' metadata nor the .json files of the data have one under `uid`.",
                        "Name data whose .json files have it (clipcid balance DATA …), or write the keys: --write-keys "
                        "FILE.txt.",
                    )
        return pa.chunked_array([found], type=pa.large_string())
