"""What `balance` has computed: counted, explained where it may surprise, and written; then the lists for other tools.

| file | writer | called from |
|---|---|---|
| ``rows.parquet`` | `write_row_numbering` | `_take_or_start` in ``run.py``, at the start |
| ``forest.parquet``, ``forest-rows.parquet``, ``forest.json`` | `write_forest` | `write_stored`, after a search |
| ``keep.parquet`` | `write_list` in ``keep_list.py`` | `write`, beside the next two |
| ``sets.parquet``, ``curve.csv`` | `write_sets` in ``keep_list.py`` | `write` |
| ``skipped.parquet``, if any sample is | `write_skipped` | `write` |
| ``report.html`` | `write_report` | `write` |
| ``balance.json`` | `Output.commit` | `write` |
| ``--write-keys``, ``--write-pairs``, ``--write-uids`` | `write_keys`, `write_pairs`, `write_kept_uids` | `write_lists` |
| ``--write-shards``, ``--write-data`` | `write_samples`, on all processes | `_balance` in ``run.py`` |

`Output.commit` also gives the files above it their final names, but for the forest, which is an output of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.fingerprint import record
from clipcid_cli.formats.results.forest import (
    CURVE,
    ROW_NUMBERING,
    SET_TABLE,
    forest_path,
    forest_sidecar_path,
    row_numbering_path,
)
from clipcid_cli.formats.results.keep_list import read_keep_list, write_keys, write_pairs
from clipcid_cli.formats.sidecar import sidecar_path
from clipcid_cli.formats.skipped import SKIPPED, read_skipped, write_skipped
from clipcid_cli.formats.work_directory import KEEP_LIST, WorkDirectory
from clipcid_cli.runtime.pipeline import Background
from clipcid_cli.steps import reporting
from clipcid_cli.steps.balance.balance_run import BalanceRun
from clipcid_cli.steps.balance.compared_linkage import ComparedLinkage
from clipcid_cli.steps.balance.compute import Outcome
from clipcid_cli.steps.balance.filters import count_dropped
from clipcid_cli.steps.balance.keep_list import Names, write_list, write_sets
from clipcid_cli.steps.balance.linkages import LINKAGES
from clipcid_cli.steps.balance.plan import BalancePlan
from clipcid_cli.steps.balance.report import REPORT, write_report
from clipcid_cli.steps.balance.result import BalanceResult
from clipcid_cli.steps.balance.run_search import forget_searches
from clipcid_cli.steps.balance.sets import Sets
from clipcid_cli.steps.embeddings import list_bad_rows
from clipcid_cli.steps.settings.balance import BalanceSettings

# A set that holds this share of all images, and so many, is a chain or a placeholder more often than many copies of one
# picture.
_LARGE_SET = 0.01
_MANY_IMAGES = 10


def write(outcome: Outcome, names: Names) -> BalanceResult:
    """Write the output, on the first process; return its result."""
    run = outcome.run
    warnings = find_warnings(run, outcome.sets)
    for warning in warnings:
        reporting.warn(warning)
    result = summarise(outcome)
    with Background() as one, Background() as other:  # at hundreds of millions of rows all take minutes
        one.start(lambda: write_list(outcome, names))
        other.start(lambda: write_sets(outcome, names))
        written = [KEEP_LIST, ROW_NUMBERING]
        if result.skipped and write_skipped(run.work / SKIPPED, _list_skipped(run)):
            written.append(SKIPPED)
        pictures = write_report(outcome, result, warnings)
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
    forget_searches(output.folder, outcome.searches)
    return result


def summarise(outcome: Outcome) -> BalanceResult:
    """Count what is kept, and what was dropped by what."""
    run, sets, compared = outcome.run, outcome.sets, outcome.compared
    rows = run.rows
    kept = int(np.count_nonzero(outcome.is_kept))
    repeats = rows.num_searched - sets.num_kept
    parts: dict[str, Any] = {dropped.name: dropped.summarise() for dropped in outcome.filters}
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
        other_linkage=compared.result if isinstance(compared, ComparedLinkage) else None,
        neighbors=run.settings.neighbors,
        audit=outcome.audit,
        dropped_by=count_dropped(outcome.dropped_first, repeats, outcome.dropped_last),
        **parts,
        skipped={**embedded, **run.skips.counts},
        seconds=run.phases(),
    )


def find_warnings(run: BalanceRun, sets: Sets) -> list[str]:
    """Explain what may surprise: fewer images than asked for, one very large set."""
    warnings = []
    settings = run.settings
    images = run.rows.num_searched
    kept = sets.num_kept
    linkage = LINKAGES[settings.linkage]
    missed = run.num_requested - kept
    if settings.keep is not None and missed > 0:
        cause = linkage.why_fewer.format(sets.threshold)
        if sets.threshold == 0.0:
            cause = f"There are more exact copies than --keep {settings.keep:g} would drop, and all of them are dropped"
        warnings.append(f"{cause}: {kept:,} images are kept, {missed:,} fewer than requested.")
    largest = sets.largest
    if largest >= _MANY_IMAGES and largest > _LARGE_SET * images:
        advice = "It may be a placeholder: see the report."
        if linkage.may_chain:
            advice = (
                "It may be a chain of different images, or a placeholder: see the report; "
                f"--linkage {linkage.compared_with} keeps sets compact."
            )
        warnings.append(f"One set holds {largest:,} of {images:,} images ({largest / images:.1%}). {advice}")
    return warnings


def _list_skipped(run: BalanceRun) -> Iterator[pa.Table]:
    """List what was skipped when the embeddings were made, and the rows that are not finite."""
    embeddings = run.embeddings
    if embeddings.sidecar is not None:
        yield from read_skipped(embeddings.folder / SKIPPED)
    if len(run.rows) < embeddings.num_rows:
        is_bad = np.ones(embeddings.num_rows, np.bool_)
        is_bad[run.rows.numbers] = False
        yield from list_bad_rows(embeddings, np.flatnonzero(is_bad))


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
    if settings.writes_samples:
        from clipcid_cli.steps.balance.write_data import validate_new_samples

        validate_new_samples(settings)


def write_lists(plan: BalancePlan) -> None:
    """Write the lists that the settings name, on the first process; no search is needed for them."""
    settings, keep_list, overwrite = plan.settings, plan.keep_list, plan.settings.overwrite
    if settings.write_keys is not None:
        write_keys(settings.write_keys, read_keep_list(keep_list).kept_keys(), overwrite=overwrite)
    if settings.write_pairs is not None:
        write_pairs(settings.write_pairs, keep_list, overwrite=overwrite)
    if settings.write_uids is not None:
        from clipcid_cli.steps.balance.uids import write_kept_uids

        write_kept_uids(plan, settings.write_uids)


def name_files(plan: BalancePlan) -> dict[str, str]:
    """Return the path of each file that was written, by its name in the JSON object."""
    settings, kind = plan.settings, plan.settings.forest_kind
    skipped = plan.folder / SKIPPED
    files = {
        "keep_list": plan.keep_list,
        "row_numbering": plan.folder / ROW_NUMBERING,
        "forest": forest_path(plan.folder, kind),
        "forest_row_numbering": row_numbering_path(plan.folder, kind),
        "forest_sidecar": forest_sidecar_path(plan.folder, kind),
        "sets": plan.folder / SET_TABLE,
        "curve": plan.folder / CURVE,
        "report": plan.folder / REPORT,
        "skipped": skipped if skipped.is_file() else None,
        "sidecar": sidecar_path(plan.folder, "balance"),
        "keys": settings.write_keys,
        "pairs": settings.write_pairs,
        "uids": settings.write_uids,
        "shards": settings.write_shards,
        "data": settings.write_data,
    }
    return {name: str(path) for name, path in files.items() if path is not None}
