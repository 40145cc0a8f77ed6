"""The rows of `balance`: which are usable, which are copies of others, and which filters have left to be searched."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
import torch

from clipcid_cli.algorithms.near.duplicates import collapse_duplicates, hash_rows
from clipcid_cli.algorithms.near.edges import Edges, sort_edges
from clipcid_cli.algorithms.near.exact import BoolArray, HalfArray, IntArray, row_type
from clipcid_cli.formats.arrays import Arrays
from clipcid_cli.formats.embeddings.rows import Rows
from clipcid_cli.formats.fingerprint import FileRecord
from clipcid_cli.runtime.distributed import DistContext
from clipcid_cli.runtime.pipeline import thread_map
from clipcid_cli.steps import reporting
from clipcid_cli.steps.balance.groups import Groups, Share, work_on_groups
from clipcid_cli.steps.balance.shared_arrays import SharedArrays

# What is computed from so few rows stays in the processor's cache.
_ROWS_AT_ONCE = 512
_ROWS_OF_THREAD = 64 * _ROWS_AT_ONCE  # that a thread looks at one after another
_EXPONENT = np.uint16(0x7C00)  # bits of a float16 that are all set in infinities and NaN alone


@dataclasses.dataclass(frozen=True)
class BalanceRows:
    """The finite rows of the embeddings, numbered 0 … N − 1 in their order, as in the keep list."""

    images: Rows  # all rows of the embeddings
    numbers: IntArray  # numbers of the finite ones among them, integers [N], ascending
    unique: IntArray  # the rows to search: those that equal no earlier one, integers [U], ascending
    copies: Edges  # edges of weight 0, ascending, that join each other row to the first of its kind
    # Which rows filters have left, bool [N]: `unique` and `copies` are of these alone. None without filters.
    is_searched: BoolArray | None = None

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def num_searched(self) -> int:
        return len(self.unique) + len(self.copies)

    def describe_choice(self) -> list[FileRecord]:
        """Describe which rows filters have left, as an input of what is made of them; nothing without filters."""
        if self.is_searched is None:
            return []
        digest = hashlib.blake2b(np.packbits(self.is_searched).tobytes(), digest_size=16).hexdigest()
        return [FileRecord("rows that filters have left", self.num_searched, f"blake2b:{digest}")]

    def read(self, rows: IntArray) -> HalfArray:
        return self.images.take(self.numbers[rows])

    def unique_positions(self) -> IntArray:
        """Return the position in `unique` of the row that each searched row equals, integers [N]."""
        positions = np.zeros(len(self), self.unique.dtype)
        positions[self.unique] = np.arange(len(self.unique), dtype=self.unique.dtype)
        positions[self.copies.b] = positions[self.copies.a]
        return positions

    def count_copies(self) -> IntArray:
        """Return how many searched rows equal each unique one, itself included, int64 [U]."""
        return 1 + np.bincount(np.searchsorted(self.unique, self.copies.a), minlength=len(self.unique))

    def restrict(self, shared: SharedArrays, is_searched: BoolArray) -> BalanceRows:
        """Return the rows with those alone to be searched that are true, bool [N]; the same on every process."""

        def choose() -> Arrays:
            kind = self.numbers.dtype
            searched = np.flatnonzero(is_searched).astype(kind)
            first = np.arange(len(self), dtype=kind)
            first[self.copies.b] = self.copies.a
            first = first[searched]
            # Of rows that equal one another the first that is left; written in reverse, it remains.
            left = np.empty(len(self), kind)
            left[first[::-1]] = searched[::-1]
            left = left[first]
            is_copy = left != searched
            copies = sort_edges(_join(left[is_copy], searched[is_copy]))
            return searched[~is_copy], copies.a, copies.b

        unique, a, b = shared.publish(choose)
        return dataclasses.replace(self, unique=unique, copies=_join(a, b), is_searched=is_searched)


def _join(a: IntArray, b: IntArray) -> Edges:
    return Edges(a, b, np.zeros(len(b), np.float32))


def read_rows(shared: SharedArrays, images: Rows) -> BalanceRows:
    """Read every row once, each process its share, to find rows that are not finite and rows that are equal."""
    parts = shared.collect(_look_at_rows, shared.context, images)

    def survey() -> Arrays:
        hash_N, finite_N = parts[0] if len(parts) == 1 else map(np.concatenate, zip(*parts, strict=True))
        numbers = np.flatnonzero(finite_N).astype(row_type(len(images)))
        if len(numbers) < len(hash_N):
            hash_N = hash_N[numbers]
        groups = Groups.from_hashes(hash_N)
        return numbers, groups.rows, groups.bounds

    numbers, *alike = shared.publish(survey)
    copies = work_on_groups(shared, images, numbers, Groups(*alike), _find_copies)

    def separate() -> Arrays:
        a, b = (np.concatenate(ends) for ends in zip(*copies, strict=True))
        edges = sort_edges(_join(a, b))
        is_copy = np.zeros(len(numbers), np.bool_)
        is_copy[edges.b] = True
        return np.flatnonzero(~is_copy).astype(numbers.dtype), edges.a, edges.b

    unique, a, b = shared.publish(separate)
    if len(b):
        said = (
            "1 row is an exact copy of an earlier one"
            if len(b) == 1
            else f"{len(b):,} rows are exact copies of earlier ones"
        )
        reporting.note(f"{said}.")
    return BalanceRows(images, numbers, unique, _join(a, b))


def _look_at_rows(context: DistContext, images: Rows) -> Arrays:
    """Return, of this process's share of the rows, hashes, uint64 [n], and which are finite, bool [n]."""
    start, stop = context.rank_range(len(images))
    hashes = np.empty(stop - start, np.uint64)
    finite = np.empty(stop - start, np.bool_)

    def look(first: int) -> None:
        for begin in range(first, min(first + _ROWS_OF_THREAD, stop), _ROWS_AT_ONCE):
            rows = images.read(begin, min(begin + _ROWS_AT_ONCE, stop))
            part = slice(begin - start, begin - start + len(rows))
            hashes[part] = hash_rows(rows)
            # A sixth of the time of `isfinite`, which converts each number first.
            finite[part] = (rows.view(np.uint16) & _EXPONENT).max(axis=1) < _EXPONENT

    for _ in thread_map(look, range(start, stop, _ROWS_OF_THREAD), torch.get_num_threads()):
        pass
    return hashes, finite


def _find_copies(alike: Share) -> Arrays:
    """Find the rows that equal an earlier one, among rows of equal hashes: the earlier ones, and the copies."""
    _, edges = collapse_duplicates(alike.read, np.arange(len(alike.rows)), alike.labels.astype(np.uint64))
    return alike.rows[edges.a], alike.rows[edges.b]
