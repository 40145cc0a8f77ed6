"""From rows to centroids: k-means on all processes, with a checkpoint after the start and each iteration in full."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from clipcid_cli.algorithms.kmeans.lloyd import LloydState, run_lloyd
from clipcid_cli.algorithms.kmeans.nearest import BLOCK_ROWS, NearestCentroids
from clipcid_cli.algorithms.kmeans.prepared import prepare_rows
from clipcid_cli.algorithms.kmeans.subspace import SUBSPACE_WIDTH, find_subspace, subspace_iterations
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.runtime.memory import memory_for_rows
from clipcid_cli.runtime.precision import Precision, choose_precision, choose_scan
from clipcid_cli.runtime.threads import map_threads, threads_for_batches
from clipcid_cli.runtime.timing import time_trial
from clipcid_cli.steps.cluster.rows import ClusterRows
from clipcid_cli.steps.reporting import Reporter

# Centroids and rows that formats are tried with, at most; a GPU is given a block of rows.
_TRIAL_CENTROIDS = 16_384
_TRIAL_ROWS = {"cpu": 256, "cuda": BLOCK_ROWS["cuda"]}
# With few centroids a run takes a millisecond, and another program could decide.
_TRIAL_SECONDS = 0.01
# int8 gains most after the first iteration, when centroids are means: on rows without structure it takes as long as fp32 at
# first and half as long later.
_PATIENCE = 1.4


def choose_format(requested: str, rows: ClusterRows, machine: Machine, centroids_KD: torch.Tensor) -> Precision:
    """Choose the format of the product that discards; the result is the same in each.

    int8 multiplies several times as fast as fp32, but where many centroids are about equally near it leaves so many to
    decide that fp32 is faster: both are tried on a block of rows.

    Args:
        requested: The precision the user asked for.
        centroids_KD: First centroids, float32 [K, D].
    """
    scan = choose_scan(requested, machine.device)
    other = choose_precision(requested, machine.device, "embed", parameters=0)
    if scan.dtype == other.dtype:
        return scan
    centroids_KD = centroids_KD[:_TRIAL_CENTROIDS].to(machine.device)
    stored = rows.features(0, min(len(rows), _TRIAL_ROWS[machine.device.type]))
    rows_BD = torch.from_numpy(np.array(stored)).to(machine.device)
    seconds = {}
    for precision in (scan, other):
        search, block = NearestCentroids(centroids_KD, precision.dtype), prepare_rows(rows_BD, precision.dtype)
        seconds[precision.name] = time_trial(
            partial(search.nearest, block), machine.device, repeats=3, at_least=_TRIAL_SECONDS
        ).seconds
    if seconds[scan.name] <= _PATIENCE * seconds[other.name]:
        return scan
    return dataclasses.replace(
        other, reason=f"{seconds[scan.name] / seconds[other.name]:.1f} times as fast as int8 on these rows"
    )


def train_centroids(
    rows: ClusterRows,
    machine: Machine,
    state: LloydState,
    *,
    iterations: int,
    dtype: torch.dtype,
    save: Callable[[LloydState], None],
    reporter: Reporter,
) -> LloydState:
    """Run k-means until no centroid moves, or `iterations` are done.

    Args:
        rows: The rows of all processes; this one takes its even share.
        state: Where to begin.
        iterations: Most iterations in all, those of `state` included.
        dtype: Format of the product that discards, see `NearestCentroids`.
        save: Called on the first process after the iterations along few directions, and after each other one.
    """
    num_short, done = subspace_iterations(iterations), state.iterations
    subspace = machine.on_main(lambda: find_subspace(rows, len(state.centroids_KD))) if done < num_short else None
    if subspace is not None:
        which = "The first iteration compares" if num_short == 1 else f"The first {num_short} iterations compare"
        reporter.note(
            f"{which} images along {SUBSPACE_WIDTH} of {rows.width} directions, which hold {subspace.share:.0%} of their "
            "squared length; the others compare in full."
        )
        subspace = subspace.to(machine.device)
    states = run_lloyd(
        rows,
        state,
        iterations=iterations,
        dtype=dtype,
        device=machine.device,
        share=machine.share(len(rows)),
        subspace=subspace,
        kept_bytes=memory_for_rows(machine.device),
        sum_over_processes=machine.sum_,
        gather=machine.gather,
        map_runs=lambda compute, runs: map_threads(runs, compute, threads_for_batches(machine.device)),
    )
    with reporter.progress("k-means", iterations - state.iterations, "iterations") as progress:
        for state in states:
            if machine.is_main:
                save(state)
            progress.advance(state.iterations - done)
            done = state.iterations
            progress.show(similarity=state.similarity, **({"empty": state.num_empty} if state.num_empty else {}))
    return state
