"""Writing what is kept: the keep list, the sets, the curve."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa

from clipcid_cli.formats.arrays import map_strings
from clipcid_cli.formats.embeddings.folder import EmbeddingFile
from clipcid_cli.formats.results.keep_list import Column, write_keep_list
from clipcid_cli.formats.results.sets import CURVE, SET_TABLE, SetTable, write_curve, write_set_table
from clipcid_cli.formats.work_directory import KEEP_LIST
from clipcid_cli.steps.balance.balance_run import BalanceRun
from clipcid_cli.steps.balance.chains import measure_sets
from clipcid_cli.steps.balance.filters.against import NearReferences
from clipcid_cli.steps.balance.filters.captions import CaptionWindow
from clipcid_cli.steps.balance.filters.cluster_cap import ClusterCap
from clipcid_cli.steps.balance.result import Outcome
from clipcid_cli.steps.balance.rows import BoolArray, take_column


def write_tables(run: BalanceRun, found: Outcome) -> SetTable:
    """Write the tables; return that of the sets."""
    folder, sets = run.work, found.sets

    def map_names(read: Callable[[EmbeddingFile], pa.ChunkedArray]) -> pa.LargeStringArray:
        return map_strings(folder, take_column(run.embeddings, read, run.rows.numbers))

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
    measured = measure_sets(run, sets)
    write_set_table(folder / SET_TABLE, measured, keys)
    write_curve(
        folder / CURVE,
        distances=sets.curve.distance,
        kept=sets.curve.kept,
        largest=sets.curve.largest,
        num_images=run.rows.num_searched,
    )
    return measured


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
