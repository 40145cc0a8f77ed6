"""Searches for near pairs on all processes, resumable: what a chunk of a plan found is saved, and what is saved is done.

A process saves the numbers of the chunks that it has done since its last save, and what its sink has gathered from them, in
one file, whole or not at all. A later run, of any number of processes, reads all files and does the other chunks. A file
that is lost or damaged costs its chunks.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from clipcid_cli.algorithms.near.edges import Edges
from clipcid_cli.algorithms.near.exact import ReadRows
from clipcid_cli.algorithms.near.plan import Plan
from clipcid_cli.algorithms.near.search import CACHE_BYTES, Panels, near_pairs_of
from clipcid_cli.algorithms.sets.forest import ForestSink
from clipcid_cli.algorithms.sets.sinks import NearestOf, PairsWithin
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.arrays import Arrays, load_arrays, save_arrays
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.runtime.memory import memory_for_rows
from clipcid_cli.runtime.pacing import SavePace
from clipcid_cli.runtime.precision import Precision
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.shared_arrays import share_arrays

# Each process has so many stretches of what is left: near rows, which take longer, are often beside each other, so everyone
# should have jobs of a panel with itself. More stretches read more panels twice.
_STRETCHES = 4
# What the first save is expected to take, mostly to merge a forest: measured at 1 and 4 million rows, 1.8 and 9.9 s.
_SECONDS_TO_SAVE_A_ROW = 2.5e-6

Sink = ForestSink | NearestOf | PairsWithin


@dataclasses.dataclass(frozen=True)
class SearchRun:
    """What all searches of a run share.

    Attributes:
        work: The folder of unfinished work.
        inputs: Identifies the rows, whatever is chosen of them.
        width: Width D of the rows.
        scan: The format of the fast product.
    """

    machine: Machine
    work: Path
    inputs: str
    width: int
    scan: Precision
    reporter: Reporter

    @property
    def rows_in_memory(self) -> int:
        """How many rows plans can rely on to fit into the memory for panels."""
        if self.machine.device.type == "cuda":
            return 2**31  # more than any strip needs; what is free differs from run to run, and plans must not
        return CACHE_BYTES // (self.width * (2 + self.scan.dtype.itemsize))

    def identify(self, plan: Plan, cutoff: float, of: str = "") -> str:
        """Hash what decides what the chunks of a plan find.

        Args:
            of: What decides it beside inputs, plan and cut-off.
        """

        def identify() -> str:
            content = "\n".join([self.inputs, plan.identity, str(np.float32(cutoff).view(np.uint32)), of])
            return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()

        return self.machine.on_main(identify)


def run_chunks(
    run: SearchRun,
    plan: Plan,
    read: ReadRows,
    cutoff: float,
    new_sink: Callable[[], Sink],
    label: str,
    *,
    of: str = "",
    folder: Path | None = None,
) -> Edges:
    """Search all chunks of a plan that are not saved yet, and return what all found; the same on every process.

    Args:
        cutoff: Largest distance of the pairs that sinks are given, inclusive.
        new_sink: Makes an empty sink.
        label: Names the search to the user.
        of: As for :meth:`SearchRun.identify`.
        folder: Where searches are saved, by default for the time of the run.
    """
    machine, number = run.machine, plan.num_chunks
    place = (run.work / ".search" if folder is None else folder) / run.identify(plan, cutoff, of)
    done = set(machine.on_main(lambda: _load(place)))
    if done:
        run.reporter.note(f"Resuming the search: {len(done):,} of {number:,} parts are done.")
    left = [chunk for chunk in range(number) if chunk not in done]
    if left:
        _search(run, plan, left, read, cutoff, new_sink(), label, place)
    machine.barrier()

    def finish() -> Arrays:
        sink = new_sink()
        if lost := number - len(set(_load(place, sink))):
            raise ClipcidError(
                f"{place}: the results of {lost:,} of {number:,} parts cannot be read.", "Run the same command again."
            )
        found = sink.result()
        return found.a, found.b, found.weight

    return Edges(*share_arrays(machine, run.work, finish))


def _search(
    run: SearchRun, plan: Plan, left: list[int], read: ReadRows, cutoff: float, sink: Sink, label: str, place: Path
) -> None:
    """Search this process's share of the chunks that are left."""
    machine = run.machine
    _load(place, sink)
    sink.drain()  # what is saved
    room = memory_for_rows(machine.device, on_cpu=CACHE_BYTES)
    panels = Panels(read, plan.panel, machine.device, run.scan.dtype, room)
    stretches = np.array_split(left, _STRETCHES * machine.size)[machine.rank :: machine.size]
    mine = np.concatenate(stretches).tolist()
    # Adding up the pairs of hundreds of millions of jobs would take minutes; most compare nearly equal numbers.
    total = plan.num_pairs * len(mine) // plan.num_chunks
    num_rows = int((plan.stops - plan.starts)[plan.first < plan.last].sum())
    pace, since = SavePace(_SECONDS_TO_SAVE_A_ROW * num_rows), list[int]()
    with run.reporter.progress(label, total, "pairs") as progress:
        for chunk in mine:
            jobs = plan.jobs(chunk)
            blocks = ((panels[i], panels[j]) for i, j in jobs)
            for job, found in zip(jobs, near_pairs_of(blocks, cutoff, sink.wants), strict=True):
                for edges in found:
                    sink.add(edges)
                progress.advance(plan.pairs_of(job))
            since.append(chunk)
            if chunk == mine[-1] or pace.is_due():
                with pace.saving():
                    edges = sink.drain()
                    arrays = {"chunks": since, "a": edges.a, "b": edges.b, "weight": edges.weight}
                    save_arrays(place / f"{since[0]}.npz", arrays)  # a name of its own: no chunk is done twice
                since = []


def _load(place: Path, sink: Sink | None = None) -> list[int]:
    """Return the numbers of the chunks that are saved, and add what they found to a sink."""
    done = list[int]()
    for path in sorted(place.glob("*.npz")):
        if (saved := load_arrays(path)) is not None:
            done += saved["chunks"].tolist()
            if sink is not None:
                sink.add(Edges(saved["a"], saved["b"], saved["weight"]))
    return done
