"""The keep list of `balance`, the table of its sets and the curve over the cut-off."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa

from clipcid_cli.formats.arrays import map_strings
from clipcid_cli.formats.embeddings.rows import EmbeddingFile
from clipcid_cli.formats.results.forest import CURVE, SET_TABLE, write_curve, write_set_table
from clipcid_cli.formats.results.keep_list import Column, write_keep_list
from clipcid_cli.formats.work_directory import KEEP_LIST
from clipcid_cli.steps.balance.compute import Outcome


def write_tables(outcome: Outcome) -> None:
    """Write what became of each row, of each set, and over the cut-off."""
    run, sets, filters = outcome.run, outcome.sets, outcome.filters
    folder = run.work

    def map_names(read: Callable[[EmbeddingFile], pa.ChunkedArray]) -> pa.LargeStringArray:
        return map_strings(folder, run.embeddings.take_column(read, run.rows.numbers))

    keys = map_names(run.embeddings.keys_of)
    columns = [_say_reasons(outcome)] if filters else []
    is_represented = (sets.representatives >= 0) & outcome.is_kept[sets.representatives]
    write_keep_list(
        folder / KEEP_LIST,
        keys=keys,
        shards=map_names(run.embeddings.shards_of),
        labels=sets.labels,
        representatives=np.where(is_represented, sets.representatives, sets.representatives.dtype.type(-1)),
        distances=sets.distances,
        more=columns + [column for kind in filters for column in kind.columns(folder)],
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
