"""Searches for near pairs on all processes, resumable: what a chunk of a plan found is saved, and what is saved is done.

A process saves the numbers of the chunks that it has done since its last save, and what its sink has gathered from them, in
one file, whole or not at all. A later run, of any number of processes, reads all files and does the other chunks. A file
that is lost or damaged costs its chunks.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from clipcid_cli.algorithms.near.block import Block, load_block
from clipcid_cli.algorithms.near.edges import Edges
from clipcid_cli.algorithms.near.exact import ReadRows
from clipcid_cli.algorithms.near.plan import Plan
from clipcid_cli.algorithms.near.search import near_pairs_of
from clipcid_cli.algorithms.sets.forest import ForestSink
from clipcid_cli.algorithms.sets.sinks import NearestOf, PairsWithin
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.arrays import Arrays, load_arrays, save_arrays
from clipcid_cli.runtime.distributed import memory_for_rows
from clipcid_cli.runtime.timing import SavePace
from clipcid_cli.steps.balance.balance_run import CACHE_BYTES, BalanceRun
from clipcid_cli.steps.balance.shared_arrays import share_arrays

# Each process has so many stretches of what is left: near rows, which take longer, are often beside each other, so everyone
# should have jobs of a panel with itself. More stretches read more panels twice.
_STRETCHES = 4
# Another number wherever the same plan would have other chunks, or a part would hold something else.
_VERSION = 1
# What the first save is expected to take, mostly to merge a forest: measured at 1 and 4 million rows, 1.8 and 9.9 s.
_SECONDS_TO_SAVE_A_ROW = 2.5e-6

Sink = ForestSink | NearestOf | PairsWithin


@dataclasses.dataclass(frozen=True)
class Search:
    """A search for near pairs.

    Attributes:
        label: Names it to the user.
        cutoff: Largest distance of the pairs that sinks are given, inclusive.
        of: What decides what is found beside the inputs of the run, plan and cut-off.
        folder: Where it is saved; None for the time of the run.
    """

    label: str
    plan: Plan
    read: ReadRows
    cutoff: float
    new_sink: Callable[[], Sink]
    of: str = ""
    folder: Path | None = None

    def place(self, run: BalanceRun) -> Path:
        """Return where it is saved, under a name that hashes what decides what its chunks find."""

        def name() -> str:
            plan = self.plan
            cutoff = np.float32(self.cutoff).view(np.uint32)
            decisive = [_VERSION, run.inputs, plan.identity, plan.num_chunks, cutoff, self.of]
            return hashlib.blake2b("\n".join(map(str, decisive)).encode(), digest_size=8).hexdigest()

        return (self.folder or run.work / ".search") / run.context.on_rank0(name)


def run_chunks(run: BalanceRun, search: Search) -> Edges:
    """Search all chunks of a plan that are not saved yet, and return what all found; the same on every process."""
    context = run.context
    number = search.plan.num_chunks
    place = search.place(run)
    done = context.on_rank0(lambda: _load(place))
    if done:
        run.reporter.note(f"Resuming the search: {len(done):,} of {number:,} parts are done.")
    left = [chunk for chunk in range(number) if chunk not in done]
    if left:
        _search(run, search, left, place)
    context.barrier()

    def finish() -> Arrays:
        sink = search.new_sink()
        if lost := number - len(_load(place, sink)):
            raise ClipcidError(
                f"{place}: the results of {lost:,} of {number:,} parts cannot be read.", "Run the same command again."
            )
        found = sink.result()
        return found.a, found.b, found.weight

    return Edges(*share_arrays(context, run.work, finish))


def _search(run: BalanceRun, search: Search, left: list[int], place: Path) -> None:
    """Search this process's share of the chunks that are left."""
    context = run.context
    plan = search.plan
    sink = search.new_sink()
    _load(place, sink)
    sink.drain()  # what is saved
    # Of the largest panel, as stored and, unless that is the same, as it is multiplied.
    an_entry = 2 + (0 if run.scan.dtype == torch.float16 else run.scan.dtype.itemsize)
    size = int((plan.stops - plan.starts).max()) * run.embeddings.width * an_entry

    @lru_cache(maxsize=max(2, memory_for_rows(context.device, on_cpu=CACHE_BYTES) // size))
    def load(panel: int) -> Block:
        return load_block(search.read, plan.panel(panel), context.device, run.scan.dtype)

    stretches = np.array_split(left, _STRETCHES * context.size)[context.rank :: context.size]
    mine = np.concatenate(stretches).tolist()
    # Adding up the pairs of hundreds of millions of jobs would take minutes; most compare nearly equal numbers.
    total = plan.num_pairs * len(mine) // plan.num_chunks
    num_rows = int((plan.stops - plan.starts)[plan.first < plan.last].sum())
    pace = SavePace(_SECONDS_TO_SAVE_A_ROW * num_rows)
    since = list[int]()
    with run.reporter.progress(search.label, total, "pairs") as progress:
        for chunk in mine:
            jobs = plan.jobs(chunk)
            blocks = ((load(i), load(j)) for i, j in jobs)
            for job, found in zip(jobs, near_pairs_of(blocks, search.cutoff, sink.wants), strict=True):
                for edges in found:
                    sink.add(edges)
                progress.advance(plan.pairs_of(job))
            since.append(chunk)
            if chunk == mine[-1] or pace.is_due():
                with pace.saving():
                    edges = sink.drain()
                    arrays = {"chunks": since, "a": edges.a, "b": edges.b, "weight": edges.weight}
                    save_arrays(place / f"{since[0]}.npz", arrays)
                since = []


def _load(place: Path, sink: Sink | None = None) -> set[int]:
    """Return the numbers of the chunks that are saved, and add what they found to a sink, that of each chunk once.

    Two files can hold one chunk where a file could not be read for a while. Only one of them counts.
    """
    done = set[int]()
    for path in sorted(place.glob("*.npz")):
        saved = load_arrays(path)
        if saved is not None and done.isdisjoint(chunks := saved["chunks"].tolist()):
            done.update(chunks)
            if sink is not None:
                sink.add(Edges(saved["a"], saved["b"], saved["weight"]))
    return done
