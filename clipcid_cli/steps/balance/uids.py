"""``balance --write-uids``: DataComp's identifiers of the kept samples."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clipcid_cli.algorithms.near.exact import IntArray
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.samples import Sample
from clipcid_cli.formats.embeddings.folder import Embeddings
from clipcid_cli.formats.embeddings.rows import EmbeddingFile
from clipcid_cli.formats.join import join, parquet_listing
from clipcid_cli.formats.results.keep_list import are_uids, read_keep_list, write_uids
from clipcid_cli.steps import reporting
from clipcid_cli.steps.balance.plan import BalancePlan
from clipcid_cli.steps.balance.samples import SampleFinder, open_data, read_uid
from clipcid_cli.steps.settings.balance import BalanceSettings

# Rows whose identifiers are looked up together.
_ROWS_AT_ONCE = 4096


def validate_uids(settings: BalanceSettings, embeddings: Embeddings) -> None:
    """Check that the first sample has an identifier, so that no search is wasted; a dry run keeps no index made for it."""
    first = next(file for file in embeddings.files if file.rows)
    with tempfile.TemporaryDirectory() as scratch:
        _UidFinder(settings, embeddings, Path(scratch) if settings.dry_run else None).find(first, np.array([0]))


def write_kept_uids(plan: BalancePlan, path: Path) -> None:
    """Write the identifiers of the kept samples, each once."""
    num_kept = read_keep_list(plan.keep_list).num_kept
    written = write_uids(path, _kept_uids(plan, num_kept), num_kept, overwrite=plan.settings.overwrite)
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
        """Return the identifiers of the rows at some places in a file, n strings of 32 hexadecimal digits."""
        keys = self._embeddings.keys_of(file).take(pa.array(places))
        uids = keys
        if self._embeddings.has_uids:
            stored = self._embeddings.uids_of(file).take(pa.array(places))
            uids = pc.if_else(pa.array(are_uids(stored)), stored, keys.cast(stored.type))
        missing = np.flatnonzero(~are_uids(uids))
        if not len(missing):
            return uids
        values = uids.to_pylist()
        for start in range(0, len(missing), _ROWS_AT_ONCE):
            some = missing[start : start + _ROWS_AT_ONCE]
            samples: list[Sample | None] = [None] * len(some)
            if self._samples is not None:
                samples = self._samples.find_rows(self._embeddings, file.first + places[some])
            for row, sample in zip(some.tolist(), samples, strict=True):
                values[row] = read_uid(sample)
                if values[row] is None:
                    raise ClipcidError(
                        f"Sample {keys[row].as_py()!r} has no uid of DataComp's: its key is not 32 hexadecimal digits, and "
                        "neither the embeddings' metadata nor the .json files of the data have one under `uid`.",
                        "Name data whose .json files have it (clipcid balance DATA …), or write the keys: --write-keys "
                        "FILE.txt.",
                    )
        return pa.chunked_array([values], type=pa.large_string())
