"""`cluster`: kept embeddings → centroids by k-means → the nearest centroids of every image and caption."""

from __future__ import annotations

import time
from typing import Any

import torch

from clipcid_cli.algorithms.kmeans.kmeans import default_num_clusters
from clipcid_cli.algorithms.kmeans.lloyd import LloydState
from clipcid_cli.algorithms.kmeans.seeding import first_centroids
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.arrays import load_arrays, save_arrays
from clipcid_cli.formats.atomic import write_npy
from clipcid_cli.formats.fingerprint import record
from clipcid_cli.formats.output import Output, find_output, is_claimed
from clipcid_cli.formats.results.clusters import (
    CENTROIDS,
    PROGRESS,
    TABLE,
    join_parts,
    part_bounds,
    top_paths,
)
from clipcid_cli.formats.sidecar import ClusterSidecar
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.runtime.machine import Machine, open_machine
from clipcid_cli.steps.claim import claim_output
from clipcid_cli.steps.cluster.assign import assign_clusters, search_width, summarise, towers_of
from clipcid_cli.steps.cluster.cost import estimate_cost
from clipcid_cli.steps.cluster.rows import ClusterRows, find_rows
from clipcid_cli.steps.cluster.train import choose_format, train_centroids
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.cluster import ClusterSettings
from clipcid_cli.steps.settings.shared import given_flags

# As many as faiss asks for before it warns.
_FEWEST_A_CENTROID = 39


def run(settings: ClusterSettings, reporter: Reporter) -> dict[str, Any]:
    """Cluster embeddings.

    Returns:
        The JSON object: ``images, clusters, objective, iterations, empty_clusters, largest_cluster, skipped{}, seconds{read,
        kmeans, assign, write}, files{}``. ``objective`` is the images' mean similarity to their own centroid.
    """
    with open_machine(settings.device) as machine:
        started = time.perf_counter()
        rows = machine.on_main(lambda: find_rows(settings, reporter))
        num_clusters = _choose_num_clusters(settings, rows, reporter)
        folder = WorkDirectory(settings.work).clusters
        identity = {
            "features": settings.features,
            "num_clusters": num_clusters,
            "iterations": settings.iterations,
            "train_rows": settings.train_rows if (settings.train_rows or len(rows)) < len(rows) else None,
            "seed": settings.seed,
            "images": len(rows),
            # `embed` has made the keys of its own folders.
            "keys": settings.keys if rows.embeddings.sidecar is None else None,
        }
        wanted: dict[str, Any] = {"overwrite": settings.overwrite, "elsewhere": "--work, with --embeddings"}
        # Another tool's files are hashed for it, which a dry run does where there is something to compare them with.
        if not settings.dry_run or is_claimed(folder, "cluster"):
            wanted |= {"settings": identity, "inputs": machine.on_main(rows.fingerprint)}
        if settings.dry_run:
            if "inputs" in wanted:
                machine.on_main(lambda: find_output(folder, "cluster", ClusterSidecar, **wanted))
            return estimate_cost(settings, machine, rows, num_clusters, search_width(num_clusters), reporter)
        seconds = {"read": time.perf_counter() - started}
        with claim_output(machine, folder, "cluster", ClusterSidecar, **wanted) as output:
            if output.finished is None:
                result = _cluster(settings, machine, rows, num_clusters, output, seconds, reporter)
            else:
                reporter.note(f"These clusters are in {folder} already.")
                result = output.finished.result
        names = {"centroids": CENTROIDS, "clusters": TABLE, "sidecar": "cluster.json"}
        return result | {"files": {name: str(folder / file) for name, file in names.items()}}


def _choose_num_clusters(settings: ClusterSettings, rows: ClusterRows, reporter: Reporter) -> int:
    count = len(rows) if settings.train_rows is None else min(settings.train_rows, len(rows))
    if settings.num_clusters is None:
        chosen = min(count, default_num_clusters(len(rows)))
        reporter.note(f"Clusters: {chosen:,}, the default for {len(rows):,} images (--num-clusters).")
        return chosen
    if settings.num_clusters > count:
        there = f"the {len(rows):,} images to cluster" if count == len(rows) else f"--train-rows {count:,}"
        raise ClipcidError(
            f"--num-clusters {settings.num_clusters:,} is more than {there}.",
            f"Give --num-clusters at most {count:,}; the default would be {min(count, default_num_clusters(len(rows))):,}.",
        )
    return settings.num_clusters


def _warn_of_few(num_trained: int, num_clusters: int, reporter: Reporter) -> None:
    if num_trained < _FEWEST_A_CENTROID * num_clusters:
        reporter.warn(
            f"--train-rows {num_trained:,} gives each of {num_clusters:,} centroids {num_trained / num_clusters:.1f} "
            f"images, too few to represent the others. Use at least {_FEWEST_A_CENTROID * num_clusters:,} "
            f"({_FEWEST_A_CENTROID} a centroid)."
        )


def _cluster(
    settings: ClusterSettings,
    machine: Machine,
    rows: ClusterRows,
    num_clusters: int,
    output: Output[ClusterSidecar],
    seconds: dict[str, float],
    reporter: Reporter,
) -> dict[str, Any]:
    started = time.perf_counter()
    trained = rows
    if settings.train_rows is not None and settings.train_rows < len(rows):
        trained = rows.sample(settings.train_rows, settings.seed)
        _warn_of_few(len(trained), num_clusters, reporter)

    def begin() -> LloydState:
        output.start()
        found = load_arrays(output.work / PROGRESS)
        if found is None:
            return LloydState(first_centroids(trained, num_clusters, settings.seed))
        iterations = int(found["iterations"])
        reporter.note(f"Resuming after {iterations} iterations.")
        return LloydState(torch.from_numpy(found["centroids"]), iterations, bool(found["converged"]))

    def save(state: LloydState) -> None:
        progress = {"centroids": state.centroids_KD.numpy(), "iterations": state.iterations}
        save_arrays(output.work / PROGRESS, progress | {"converged": state.converged})

    state = machine.on_main(begin)
    scan = machine.on_main(lambda: choose_format(settings.precision, trained, machine, state.centroids_KD))
    used = "all images" if len(trained) == len(rows) else f"{len(trained):,} of {len(rows):,} images (--train-rows)"
    reporter.note(f"Centroids are computed from {used}, compared in {scan.name} ({scan.reason}) and decided in fp64.")
    state = train_centroids(
        trained,
        machine,
        state,
        iterations=settings.iterations,
        dtype=scan.dtype,
        save=save,
        reporter=reporter,
    )
    seconds["kmeans"] = time.perf_counter() - started

    started = time.perf_counter()
    assign_clusters(machine, rows, state.centroids_KD.to(machine.device), output.work, reporter)
    seconds["assign"] = time.perf_counter() - started

    def write() -> dict[str, Any]:
        begun = time.perf_counter()
        write_npy(output.work / CENTROIDS, state.centroids_KD.numpy())
        bounds = part_bounds(len(rows))
        join_parts(output.work, bounds, rows.keys)
        result, temperatures = summarise(rows, num_clusters, output.work)
        seconds["write"] = time.perf_counter() - begun
        result |= {
            "iterations": state.iterations,
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
        }
        if result["empty_clusters"]:
            reporter.warn(
                f"{result['empty_clusters']:,} of {num_clusters:,} clusters are empty: the data has hardly more "
                "different images than clusters, or fewer. Use a smaller --num-clusters."
            )
        arrays = [path.name for tower in towers_of(rows) for path in top_paths(output.work, tower)]
        output.commit(
            counts={"read": rows.embeddings.num_rows, "used": len(rows), "skipped": rows.skips.counts},
            seconds=seconds,
            outputs=[record(output.work / name, output.work) for name in (CENTROIDS, TABLE, *arrays)],
            embeddings=WorkDirectory(settings.work).name_of(rows.embeddings.folder),
            keep_list=None if rows.keep_list is None else record(rows.keep_list),
            flags=given_flags(settings),
            model=None if rows.embeddings.sidecar is None else rows.embeddings.sidecar.model,
            num_nearest=search_width(num_clusters),
            temperatures=temperatures,
            result=result,
        )
        return result

    return machine.on_main(write)
