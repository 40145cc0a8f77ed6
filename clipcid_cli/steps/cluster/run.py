"""`cluster`: kept embeddings → centroids by k-means → the nearest centroids of every image and caption."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from clipcid_cli.algorithms.kmeans.centroids import first_centroids, rows_as_centroids
from clipcid_cli.algorithms.kmeans.kmeans import temperature_for_perplexity
from clipcid_cli.algorithms.kmeans.lloyd import LloydState, Processes, run_lloyd
from clipcid_cli.algorithms.near.block import bytes_an_entry, make_block
from clipcid_cli.algorithms.near.nearest import NearestCentroid, top_nearest
from clipcid_cli.formats.arrays import load_arrays, save_arrays
from clipcid_cli.formats.atomic import write_npy
from clipcid_cli.formats.fingerprint import record
from clipcid_cli.formats.output import Output
from clipcid_cli.formats.results.clusters import (
    CENTROIDS,
    PROGRESS,
    TABLE,
    join_parts,
    map_tops,
    part_arrays,
    part_bounds,
    part_path,
    read_label_parts,
    top_paths,
)
from clipcid_cli.formats.sidecar import ClusterSidecar
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.runtime.distributed import DistContext, memory_for_rows, open_dist_context
from clipcid_cli.runtime.pipeline import thread_map, threads_for_batches
from clipcid_cli.runtime.precision import choose_coarse_dtype
from clipcid_cli.runtime.timing import time_trial, timed
from clipcid_cli.steps import reporting
from clipcid_cli.steps.claim import claim_output
from clipcid_cli.steps.cluster.plan import ClusterPlan, make_plan
from clipcid_cli.steps.cluster.result import ClusterCost, ClusterResult
from clipcid_cli.steps.reporting import format_duration
from clipcid_cli.steps.settings.cluster import ClusterSettings
from clipcid_cli.steps.settings.shared import given_flags

# Rows that a thread looks up together.
_ROWS_AT_ONCE = {"cpu": 2048, "cuda": 8192}
# The temperature's median is taken over about this many rows, evenly spaced: more would not change its digits.
_TEMPERATURE_ROWS = 65_536

# A dry run times a batch of so many rows and centroids, for so many seconds at least.
_BATCH = 1024
_CENTROIDS = 4096
_SHORTEST = 0.1
# Libraries, products and other work in progress, and what a row takes in addition to its embedding.
_BYTES_OF_LIBRARIES = 450 * 2**20
_BYTES_A_ROW = 24


def run(settings: ClusterSettings) -> ClusterResult | ClusterCost:
    """Cluster embeddings."""
    seconds = dict[str, float]()
    with open_dist_context(settings.device) as context:
        with timed(seconds, "read"):
            plan = context.on_rank0(lambda: make_plan(settings))
        if settings.dry_run:
            return _estimate_cost(plan, context)
        with timed(seconds, "read"):
            spec = context.on_rank0(plan.identify)
        with claim_output(context, spec) as output:
            if output.finished is not None:
                reporting.note(f"These clusters are in {plan.folder} already.")
                result = msgspec.convert(output.finished.result, ClusterResult)
            else:
                context.on_rank0(output.start)
                with timed(seconds, "kmeans"):
                    state = _train(plan, context, output.work / PROGRESS)
                with timed(seconds, "assign"):
                    _assign(plan, context, state.centroids_KD, output.work)
                result = context.on_rank0(lambda: _write(plan, state, output, seconds))
        names = {"centroids": CENTROIDS, "clusters": TABLE, "sidecar": "cluster.json"}
        return msgspec.structs.replace(result, files={name: str(plan.folder / file) for name, file in names.items()})


def _train(plan: ClusterPlan, context: DistContext, progress: Path) -> LloydState:
    """Run k-means until no centroid moves, or all iterations are done; every process takes its even share of the rows."""
    settings, trained, num_rows = plan.settings, plan.trained, len(plan.rows)

    def begin() -> LloydState:
        found = load_arrays(progress)
        if found is None:
            return LloydState(first_centroids(trained, plan.num_clusters, settings.seed))
        iterations = int(found["iterations"])
        reporting.note(f"Resuming after {iterations} iterations.")
        return LloydState(torch.from_numpy(found["centroids"]), iterations, bool(found["converged"]))

    state = context.on_rank0(begin)
    scan = choose_coarse_dtype(settings.precision, context.device)
    used = "all images" if len(trained) == num_rows else f"{len(trained):,} of {num_rows:,} images (--train-rows)"
    reporting.note(f"Centroids are computed from {used}, compared in {scan.name} ({scan.reason}) and decided in fp64.")
    states = run_lloyd(
        trained,
        state,
        iterations=settings.iterations,
        dtype=scan.dtype,
        device=context.device,
        processes=Processes(
            context.rank_range,
            context.sum_,
            context.gather,
            lambda compute, runs: thread_map(compute, runs, threads_for_batches(context.device)),
            kept_bytes=memory_for_rows(context.device),
        ),
    )
    with reporting.progress("k-means", settings.iterations - state.iterations, "iterations") as bar:
        for state in states:
            if context.is_main and state.resumable:
                so_far = {"iterations": state.iterations, "converged": state.converged}
                save_arrays(progress, {"centroids": state.centroids_KD.numpy(), **so_far})
            bar.advance()
            bar.show(similarity=state.similarity, **({"empty": state.num_empty} if state.num_empty else {}))
    return state


def _assign(plan: ClusterPlan, context: DistContext, centroids_KD: torch.Tensor, folder: Path) -> None:
    """Write the parts of the table that are not there yet, dealt to the processes."""
    bounds = part_bounds(len(plan.rows))
    mine = range(context.rank, len(bounds), context.size)
    left = [part for part in mine if not part_path(folder, part).exists()]
    centroids_KD = centroids_KD.to(context.device)
    size = _ROWS_AT_ONCE[context.device.type]
    blocks = (
        (part, first, min(first + size, bounds[part][1])) for part in left for first in range(*bounds[part], size)
    )

    def look_up(block: tuple[int, int, int]) -> tuple[int, dict[str, npt.NDArray[Any]]]:
        part, start, stop = block
        tops = {}
        for tower, read in plan.rows.towers.items():
            rows_BD = torch.from_numpy(read(np.arange(start, stop))).to(context.device)
            found_Bm, cosine_Bm = top_nearest(rows_BD, centroids_KD, plan.num_nearest)
            tops[tower] = found_Bm.cpu().numpy(), cosine_Bm.cpu().numpy()
        return part, part_arrays(tops)

    own, open_ = (sum(bounds[part][1] - bounds[part][0] for part in parts) for parts in (mine, left))
    with reporting.progress("assign", own, "images") as progress:
        progress.advance(own - open_)
        # One set of threads for all parts: new ones for each would share a core until the system has spread them.
        found = thread_map(look_up, blocks, threads_for_batches(context.device))
        for part, blocks_of_part in itertools.groupby(found, key=itemgetter(0)):
            pieces = [arrays for _, arrays in blocks_of_part]
            arrays = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
            save_arrays(part_path(folder, part), arrays)
            progress.advance(bounds[part][1] - bounds[part][0])
    context.barrier()


def _summarise(plan: ClusterPlan, folder: Path) -> tuple[float, npt.NDArray[np.int64], dict[str, float]]:
    """Return the objective, the images of each cluster, and the temperatures, from the table and the arrays.

    Sums are taken in the order of the parts, which depends on the number of rows only.
    """
    num_rows = len(plan.rows)
    totals: list[float] = []
    sizes = np.zeros(plan.num_clusters, dtype=np.int64)
    for labels, similarities in read_label_parts(folder):
        totals.append(float(similarities.sum(dtype=np.float64)))
        sizes += np.bincount(labels, minlength=plan.num_clusters)
    every = -(-num_rows // _TEMPERATURE_ROWS)
    temperatures = {
        tower: temperature_for_perplexity(map_tops(folder, tower, num_rows).similarities[::every])
        for tower in plan.rows.towers
    }
    return math.fsum(totals) / num_rows, sizes, temperatures


def _write(
    plan: ClusterPlan, state: LloydState, output: Output[ClusterSidecar], seconds: dict[str, float]
) -> ClusterResult:
    """Write centroids and table, and finish the output; return its result."""
    rows, embeddings, num_clusters = plan.rows, plan.rows.embeddings, plan.num_clusters
    with timed(seconds, "write"):
        write_npy(output.work / CENTROIDS, state.centroids_KD.numpy())
        join_parts(output.work, part_bounds(len(rows)), rows.keys)
        objective, sizes, temperatures = _summarise(plan, output.work)
    result = ClusterResult(
        images=len(rows),
        clusters=num_clusters,
        objective=objective,
        empty_clusters=int((sizes == 0).sum()),
        largest_cluster=int(sizes.max()),
        skipped=rows.skips.counts,
        iterations=state.iterations,
        repair=rows.repair if embeddings.image_map is not None else None,
        seconds={name: round(value, 3) for name, value in seconds.items()},
    )
    if result.empty_clusters:
        reporting.warn(
            f"{result.empty_clusters:,} of {num_clusters:,} clusters are empty: the data has hardly more "
            "different images than clusters, or fewer. Use a smaller --num-clusters."
        )
    folders = [WorkDirectory(plan.settings.work).name_of(member.folder) for member in embeddings.members]
    arrays = [path.name for tower in rows.towers for path in top_paths(output.work, tower)]
    output.commit(
        counts={"read": embeddings.num_rows, "used": len(rows), "skipped": rows.skips.counts},
        seconds=seconds,
        outputs=[record(output.work / name, output.work) for name in (CENTROIDS, TABLE, *arrays)],
        embeddings=folders if len(folders) > 1 else folders[0],
        keep_list=None if rows.keep_list is None else record(rows.keep_list),
        repair=None if embeddings.image_map is None else embeddings.image_map.record,
        flags=given_flags(plan.settings),
        model=embeddings.model,
        num_nearest=plan.num_nearest,
        temperatures=temperatures,
        result=result,
    )
    return result


def _estimate_cost(plan: ClusterPlan, context: DistContext) -> ClusterCost:
    """Say what the run takes, without writing anything."""
    settings = plan.settings
    rows = plan.rows
    num_trained = len(plan.trained)
    num_clusters = plan.num_clusters
    width = rows.width
    scan = choose_coarse_dtype(settings.precision, context.device).dtype
    iteration, assign = context.on_rank0(lambda: _measure(plan, scan, context))
    iteration *= num_trained
    assign *= len(rows) * len(rows.towers)
    kept = min(memory_for_rows(context.device), bytes_an_entry(scan) * width * num_trained // context.size)
    memory = num_clusters * width * (4 + 8 + scan.itemsize) + kept
    memory += _BYTES_OF_LIBRARIES + _BYTES_A_ROW * len(rows)
    reporting.note(
        f"{num_trained:,} images × {num_clusters:,} clusters × width {width}: {format_duration(iteration)} for an "
        f"iteration, at most {format_duration(iteration * settings.iterations)} for {settings.iterations} (fewer and fewer "
        f"images are compared again), {format_duration(assign)} to assign {len(rows):,}; {memory / 2**30:.3g} GiB a process "
        "above the mapped files."
    )
    seconds = {"kmeans_least": iteration, "kmeans_most": iteration * settings.iterations, "assign": assign}
    return ClusterCost(
        images=len(rows),
        clusters=num_clusters,
        flop=2 * num_trained * num_clusters * width * settings.iterations,
        memory_bytes=memory,
        seconds={name: round(value, 3) for name, value in seconds.items()},
    )


def _measure(plan: ClusterPlan, scan: torch.dtype, context: DistContext) -> tuple[float, float]:
    """Time a batch of rows against some rows as centroids: seconds a row, of an iteration and of the assignment."""
    device, rows = context.device, plan.rows
    chosen = np.linspace(0, len(rows) - 1, min(plan.num_clusters, _CENTROIDS), dtype=np.int64)
    centroids_CD = rows_as_centroids(rows, chosen).to(device)
    batch_BD = torch.from_numpy(rows.features(np.arange(min(len(rows), _BATCH)))).to(device)
    nearest = NearestCentroid(centroids_CD, scan)
    block = make_block(np.arange(len(batch_BD)), batch_BD, scan)

    def seconds_a_row(work: Callable[[], object]) -> float:
        return time_trial(work, device, at_least=_SHORTEST).seconds / len(batch_BD) / context.size

    prepare = seconds_a_row(lambda: make_block(block.rows, batch_BD, scan))
    iterate = seconds_a_row(lambda: nearest.of(block))
    assign = seconds_a_row(lambda: top_nearest(batch_BD, centroids_CD, plan.num_nearest))
    scale = plan.num_clusters / len(centroids_CD)
    return prepare + iterate * scale, assign * scale
