"""Searches for near pairs on all processes, resumable: what a chunk of the jobs found is saved, and what is saved is done.

A process saves the numbers of the chunks that it has done since its last save, and what its sink has gathered from them, in
one file, whole or not at all. A later run, of any number of processes, merges all files and does the other chunks. A file
that is lost or damaged costs its chunks.

Resuming. Saved chunks lie in a folder whose name hashes all that decides their results (`find_place`): the files of
embeddings, the jobs (the rows compared, cut into panels), the distance searched to, and what a search adds, as the edges a
forest begins with. A folder of another name is not read, so what is saved is lost to a search up to another distance, of
other rows (more files, other filters), or on another kind of device, whose memory holds other panels at a time. The number
of processes, the format of the fast product, `--select` and the lists do not matter; `--keep`, `--threshold` and `--linkage`
may, since they decide the distance. Before that `find_output` has decided whether the work folder is taken over at all, and
`_survey` which of the saved files can be read (`load_arrays`) and count.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import lru_cache
from itertools import chain
from pathlib import Path

import numpy as np

from clipcid_cli.algorithms.near.block import Block, bytes_an_entry, load_block
from clipcid_cli.algorithms.near.edges import Edges
from clipcid_cli.algorithms.near.search import search_jobs
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.arrays import array_journal
from clipcid_cli.runtime.distributed import memory_for_rows
from clipcid_cli.runtime.save_pace import SavePace
from clipcid_cli.steps import reporting
from clipcid_cli.steps.balance.balance_run import CACHE_BYTES, BalanceRun
from clipcid_cli.steps.balance.merge import merge
from clipcid_cli.steps.balance.run_search import KEPT, Search

# Each process has so many stretches of what is left: near rows, which take longer, are often beside each other, so everyone
# should have jobs of a panel with itself. More stretches read more panels twice.
_STRETCHES = 4
# Another number wherever the same jobs would have other chunks, or a part would hold something else.
_VERSION = 2


def run_chunks(run: BalanceRun, search: Search) -> Edges:
    """Search all chunks of the jobs that are not saved yet, and return what all found; the same on every process.

    Processes wait for one another at the survey, at the merge of what was saved, behind the chunks, at the second survey and
    at the last merge. They do not inside `_do_chunks`, where each has other chunks. So an error in it ends its process
    at once: in `on_all` it would first wait until the others have searched all of theirs, perhaps for hours.
    """
    context = run.context
    num_chunks = search.jobs.num_chunks
    place = find_place(run, search)
    saved = context.on_rank0(_survey, place)
    done = set(chain.from_iterable(saved.values()))
    if 0 < len(done) < num_chunks:
        reporting.note(f"Resuming the search: {len(done):,} of {num_chunks:,} parts are done.")
    elif done:
        reporting.note("All comparisons were made before.")
    left = [chunk for chunk in range(num_chunks) if chunk not in done]
    if left:
        _do_chunks(run, search, left, place, _merge(run, search, place, saved) if saved else None)
        context.barrier()

    def list_all() -> list[str]:
        saved = _survey(place)
        if lost := num_chunks - sum(map(len, saved.values())):
            raise ClipcidError(
                f"{place}: the results of {lost:,} of {num_chunks:,} parts cannot be read.",
                "Run the same command again.",
            )
        return list(saved)

    return _merge(run, search, place, context.on_rank0(list_all))


def _do_chunks(run: BalanceRun, search: Search, left: list[int], place: Path, known: Edges | None) -> None:
    """Search this process's share of the chunks that are left; what is saved is known."""
    context = run.context
    jobs = search.jobs
    sink = search.new_sink()
    if known is not None:
        sink.add(known)
        sink.result()
        sink.drain()
        del known
    largest = int((jobs.stops - jobs.starts).max()) * run.embeddings.width * bytes_an_entry(run.scan.dtype)

    @lru_cache(maxsize=max(2, memory_for_rows(context.device, on_cpu=CACHE_BYTES) // largest))
    def load(panel: int) -> Block:
        return load_block(search.read, jobs.panel(panel), context.device, run.scan.dtype)

    stretches = np.array_split(left, _STRETCHES * context.size)[context.rank :: context.size]
    mine = np.concatenate(stretches).tolist()
    # Adding up the pairs of hundreds of millions of jobs would take minutes; most compare nearly equal numbers.
    total = jobs.num_pairs * len(mine) // jobs.num_chunks
    journal = array_journal(place)
    pace = SavePace(expected=0.0)
    since = list[int]()
    with reporting.progress(search.label, total, "pairs") as progress:
        for chunk in mine:
            for job, pieces in search_jobs(jobs.of_chunk(chunk), load, search.searched_to, sink.wants):
                for edges in pieces:
                    sink.add(edges)
                progress.advance(jobs.pairs_of(job))
            since.append(chunk)
            if chunk == mine[-1] or pace.is_due():
                with pace.saving():
                    edges = sink.drain()
                    arrays = {"chunks": since, "a": edges.a, "b": edges.b, "weight": edges.weight}
                    journal.append(str(since[0]), arrays)
                since = []


def _survey(place: Path) -> dict[str, list[int]]:
    """Return the names of the files that can be read, with the numbers of their chunks.

    Two files can hold one chunk where a file could not be read for a while, or was merged right before a kill. Only one of
    them counts, that with more chunks.
    """
    readable = {name: saved["chunks"].tolist() for name, saved in array_journal(place).entries()}
    counted = dict[str, list[int]]()
    done = set[int]()
    for name in sorted(readable, key=lambda name: -len(readable[name])):
        if done.isdisjoint(readable[name]):
            counted[name] = readable[name]
            done.update(readable[name])
    return counted


def _merge(run: BalanceRun, search: Search, place: Path, names: Iterable[str]) -> Edges:
    """Return what files hold together; the same on every process."""
    return merge(run.shared, search.new_sink(), array_journal(place), list(names))


def find_place(run: BalanceRun, search: Search) -> Path:
    """Return where the chunks of a search are saved, under a name that hashes all that decides their results."""

    def name() -> str:
        jobs = search.jobs
        distance = np.float32(search.searched_to).view(np.uint32)
        decisive = [_VERSION, run.inputs_hash, jobs.identity, jobs.num_chunks, distance, search.further_identity()]
        return hashlib.blake2b("\n".join(map(str, decisive)).encode(), digest_size=8).hexdigest()

    folder = run.output.folder / KEPT if search.stays else run.work / ".search"
    return folder / run.context.on_rank0(name)
