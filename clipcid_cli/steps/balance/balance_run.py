"""What all parts of one `balance` share: its settings and its rows."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from clipcid_cli.algorithms.near.duplicates import collapse_duplicates, hash_rows
from clipcid_cli.algorithms.near.edges import Edges, sort_edges
from clipcid_cli.algorithms.near.exact import BoolArray, HalfArray, IntArray, row_type
from clipcid_cli.formats.arrays import Arrays
from clipcid_cli.formats.data.dataset import Dataset
from clipcid_cli.formats.embeddings.folder import Embeddings
from clipcid_cli.formats.embeddings.rows import Kind, Rows
from clipcid_cli.formats.fingerprint import FileRecord, identity_of
from clipcid_cli.formats.output import Output, OutputSpec
from clipcid_cli.formats.results.keep_list import BalanceSidecar
from clipcid_cli.formats.skips import Skips
from clipcid_cli.formats.work_directory import KEEP_LIST, WorkDirectory
from clipcid_cli.runtime.distributed import DistContext
from clipcid_cli.runtime.precision import Precision
from clipcid_cli.steps import reporting
from clipcid_cli.steps.balance.groups import Groups, Share, work_on_groups
from clipcid_cli.steps.balance.shared_arrays import SharedArrays
from clipcid_cli.steps.settings.balance import BalanceSettings

# Limit on a CPU of the panels kept in memory, in the format of the fast product and as stored.
CACHE_BYTES = 2**30
# Memory that plans rely on for panels, as stored in float16 and as copies of at most float32. It is a property of the device
# alone: what is free differs from run to run, and plans must not.
_PLANNED_BYTES = {"cpu": CACHE_BYTES, "cuda": 2**32}
_BYTES_AN_ENTRY = 2 + 4
# What is computed from so few rows stays in the processor's cache.
_ROWS_AT_ONCE = 512


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
    start, stop = shared.context.rank_range(len(images))
    hashes = np.empty(stop - start, np.uint64)
    finite = np.empty(stop - start, np.bool_)
    for begin in range(start, stop, _ROWS_AT_ONCE):
        rows = images.read(begin, min(begin + _ROWS_AT_ONCE, stop))
        part = slice(begin - start, begin - start + len(rows))
        hashes[part] = hash_rows(rows)
        finite[part] = np.isfinite(rows).all(axis=1)
    parts = shared.collect((hashes, finite))
    del hashes, finite

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
        a, b = (np.concatenate(each) for each in zip(*copies, strict=True))
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


def _find_copies(alike: Share) -> Arrays:
    """Find, among rows of equal hashes, those that equal an earlier one: the first of their kind, and they."""
    _, edges = collapse_duplicates(alike.read, np.arange(len(alike.rows)), alike.labels.astype(np.uint64))
    return alike.rows[edges.a], alike.rows[edges.b]


@dataclasses.dataclass(frozen=True)
class Reference:
    """One reference, by the name that the user gave, the hash of its files, and its usable rows, int64 [R], ascending."""

    name: str
    identity: str
    embeddings: Embeddings
    numbers: IntArray


@dataclasses.dataclass(frozen=True)
class FoundClusters:
    """The clusters of ``--max-per-cluster``, the hash of their table, and how many images are in them."""

    folder: Path
    identity: str
    images: int
    skipped: int  # how many are in none, since their rows are not usable
    of_repaired: bool  # whether they were made of repaired rows, which `balance` does not read


@dataclasses.dataclass(frozen=True, kw_only=True)
class BalancePlan:
    """What one `balance` works on."""

    settings: BalanceSettings
    context: DistContext
    embeddings: Embeddings
    data: Dataset | None = None  # the data that kept samples are copied from; None where they are not
    clusters: FoundClusters | None  # those of ``--max-per-cluster``
    references: Sequence[Reference] = ()  # those of ``--against``; none in a dry run, which makes no embeddings of them
    seconds: dict[str, float]  # time by phase, but for that of writing; those that follow add theirs

    @property
    def folder(self) -> Path:
        return WorkDirectory(self.settings.work).balance

    @property
    def keep_list(self) -> Path:
        return self.folder / KEEP_LIST

    def identify(self) -> OutputSpec[BalanceSidecar]:
        """Say what decides the output; call it on the first process.

        All settings may change on an existing forest; of the inputs, there may be more.
        """
        settings, embeddings, references = self.settings, self.embeddings, self.references
        names = ["keep", "threshold", "cosine_distance", "linkage", "select", "neighbors", "max_per_cluster"]
        names += ["min_caption_similarity", "max_caption_similarity"]
        opened = [embeddings, *(each.embeddings for each in references)]
        inputs = embeddings.fingerprints([Kind.TEXTS] if settings.reads_texts else [])
        texts = inputs.pop() if settings.reads_texts else None
        identity = {name: getattr(settings, name) for name in names} | {
            "seed": settings.seed if settings.select == "random" else None,
            "texts": None if texts is None else texts.hash,
            "keys": next((each.key_rule for each in opened if each.key_rule is not None), None),
            "clusters": None if self.clusters is None else self.clusters.identity,
            "against": [[each.name, each.identity] for each in references] or None,
            "against_threshold": settings.reference_distance if references else None,
        }
        return OutputSpec(
            self.folder,
            "balance",
            BalanceSidecar,
            settings=identity,
            inputs=inputs,
            overwrite=settings.overwrite,
            may_differ={*identity} if settings.overwrite else {*identity, "inputs"},
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class BalanceRun(BalancePlan):
    """One that has begun."""

    output: Output[BalanceSidecar]
    shared: SharedArrays
    rows: BalanceRows
    skips: Skips  # rows that are not finite
    scan: Precision  # the format of the fast product
    # When its output was begun, by `time.perf_counter`.
    began: float

    @property
    def work(self) -> Path:
        """The folder of unfinished work, which all processes reach."""
        return self.output.work

    @cached_property
    def inputs(self) -> str:
        """Identifies the rows, whatever is chosen of them."""
        return identity_of({}, self.output.spec.inputs)

    @property
    def rows_in_memory(self) -> int:
        """How many rows plans can rely on to fit into the memory for panels."""
        return _PLANNED_BYTES[self.context.device.type] // (self.embeddings.width * _BYTES_AN_ENTRY)

    def work_on_groups(self, groups: Groups, work: Callable[[Share], Arrays]) -> list[Arrays]:
        """Let every process work on its share of groups of rows; return the results of all on the first one."""
        return work_on_groups(self.shared, self.rows.images, self.rows.numbers, groups, work)

    def phases(self) -> dict[str, float]:
        """Return the time by phase until now: what is neither searched nor audited is written."""
        other = self.seconds["search"] + self.seconds.get("audit", 0.0)
        phases = self.seconds | {"write": time.perf_counter() - self.began - other}
        return {phase: round(value, 3) for phase, value in phases.items()}
