"""The keep list of `balance`, the table of its sets and the curve over the cut-off."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pyarrow as pa

from clipcid_cli.formats.arrays import spool_strings, view_strings
from clipcid_cli.formats.embeddings.rows import EmbeddingFile
from clipcid_cli.formats.results.forest import CURVE, SET_TABLE, write_curve, write_set_table
from clipcid_cli.formats.results.keep_list import Column, write_keep_list
from clipcid_cli.formats.work_directory import KEEP_LIST
from clipcid_cli.steps.balance.balance_run import BalanceRun
from clipcid_cli.steps.balance.compute import Outcome


@dataclasses.dataclass(frozen=True)
class Names:
    """Key and shard of each row, strings [N]."""

    keys: pa.LargeStringArray
    shards: pa.LargeStringArray


def read_names(run: BalanceRun) -> Names:
    """Read the names of all rows, each process its share; the same on every process."""
    return Names(_read_strings(run, run.embeddings.keys_of), _read_strings(run, run.embeddings.shards_of))


def _read_strings(run: BalanceRun, read: Callable[[EmbeddingFile], pa.ChunkedArray]) -> pa.LargeStringArray:
    context, numbers = run.context, run.rows.numbers
    start, stop = context.rank_range(len(numbers))
    pieces = run.embeddings.take_column(read, numbers[start:stop])
    bounds, text = context.on_all(spool_strings, run.work, pieces)
    before = sum(context.gather(len(text))[: context.rank])
    # The first string begins where the last one of the process before ends.
    own = (bounds[1:] + before if context.rank else bounds, text)
    return view_strings(*run.shared.assemble(lambda: own))


def write_list(outcome: Outcome, names: Names) -> None:
    """Write what became of each row."""
    sets, filters = outcome.sets, outcome.filters
    folder = outcome.run.work
    columns = [_say_reasons(outcome)] if filters else []
    is_represented = (sets.representatives >= 0) & outcome.is_kept[sets.representatives]
    write_keep_list(
        folder / KEEP_LIST,
        keys=names.keys,
        shards=names.shards,
        labels=sets.labels,
        representatives=np.where(is_represented, sets.representatives, sets.representatives.dtype.type(-1)),
        distances=sets.distances,
        more=columns + [column for kind in filters for column in kind.columns(folder)],
    )


def write_sets(outcome: Outcome, names: Names) -> None:
    """Write what became of each set, and over the cut-off."""
    run, curve = outcome.run, outcome.sets.curve
    write_set_table(run.work / SET_TABLE, outcome.sets.table, names.keys)
    write_curve(
        run.work / CURVE,
        distances=curve.distance,
        kept=curve.kept,
        largest=curve.largest,
        num_images=run.rows.num_searched,
    )


def _say_reasons(outcome: Outcome) -> Column:
    """Return the column that names by what an image was dropped: the first filter that drops it, else as a repeat."""
    reasons = [*(kind.reason for kind in outcome.filters), "repeat"]
    masks = [kind.is_dropped for kind in outcome.filters]

    def read(part: slice) -> pa.Array:
        reason = np.full(part.stop - part.start, len(masks), np.int8)
        for place in reversed(range(len(masks))):
            reason[masks[place][part]] = place
        return pa.array(reasons, pa.string()).take(pa.array(reason, mask=outcome.is_kept[part]))

    return Column("dropped_by", pa.string(), read)
