"""`cluster`: kept embeddings → centroids by k-means → the nearest centroids of every image and caption."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch

from clipcid_cli.algorithms.kmeans.centroids import first_centroids
from clipcid_cli.algorithms.kmeans.kmeans import default_num_clusters, joint_features, temperature_for_perplexity
from clipcid_cli.algorithms.kmeans.lloyd import LloydState, Processes, bytes_of_run, run_lloyd
from clipcid_cli.algorithms.near.exact import BoolArray, HalfArray, IntArray
from clipcid_cli.algorithms.near.nearest import bytes_of_products, integer_dtype, top
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.arrays import load_arrays, save_arrays
from clipcid_cli.formats.embeddings.folder import Embeddings
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.formats.embeddings.rows import Rows
from clipcid_cli.formats.files import write_npy
from clipcid_cli.formats.fingerprint import FileRecord, record
from clipcid_cli.formats.output import Output, OutputSpec, is_claimed
from clipcid_cli.formats.results.clusters import (
    CENTROIDS,
    PROGRESS,
    ClusterParts,
    ClusterSidecar,
    join_parts,
    map_tops,
    part_arrays,
    part_bounds,
    read_label_parts,
    top_paths,
)
from clipcid_cli.formats.results.repair import RepairFigures
from clipcid_cli.formats.sidecar import sidecar_path
from clipcid_cli.formats.skips import Skips
from clipcid_cli.formats.work_directory import CLUSTERS, WorkDirectory
from clipcid_cli.runtime.distributed import DistContext, memory_for_rows, open_dist_context
from clipcid_cli.runtime.pipeline import thread_map, threads_for_batches
from clipcid_cli.runtime.precision import choose_coarse_dtype
from clipcid_cli.runtime.randomness import derive_seed
from clipcid_cli.runtime.timing import timed
from clipcid_cli.steps import reporting
from clipcid_cli.steps.claim import claim_output, preview_output
from clipcid_cli.steps.embeddings import open_kept, skip_rows
from clipcid_cli.steps.keep_list import choose_keep_list
from clipcid_cli.steps.repair import repair_teacher
from clipcid_cli.steps.settings.cluster import ClusterSettings

# As many as faiss asks for before it warns.
_MIN_PER_CENTROID = 39
NUM_NEAREST = 16
# Rows of which the chosen ones are counted.
_BLOCK = 4096
# Rows that a thread looks up together.
_ROWS_AT_ONCE = {"cpu": 2048, "cuda": 8192}
# The temperature's median is taken over about this many rows, evenly spaced: more would not change its digits.
_TEMPERATURE_ROWS = 65_536
# Libraries, products and other work in progress, and what a row takes in addition to its embedding.
_BYTES_OF_LIBRARIES = 450 * 2**20
_BYTES_A_ROW = 24


class ClusterResult(msgspec.Struct, omit_defaults=True, kw_only=True):
    """The clusters made."""

    images: int
    clusters: int
    objective: float  # mean similarity of the images to their own centroid
    empty_clusters: int
    largest_cluster: int
    skipped: dict[str, int]  # rows by reason
    iterations: int
    repair: RepairFigures | None = None  # that of the teacher, where it was repaired
    seconds: dict[str, float]  # ``read, repair, kmeans, assign, write``
    files: dict[str, str] = {}  # the path of each file by its name; the sidecar holds the result without them


class ClusterCost(msgspec.Struct, omit_defaults=True):
    """What a run would take."""

    images: int
    clusters: int
    flop: int  # that of products of all rows (of ``--train-rows``) with all centroids in each iteration
    # Of a process above the mapped files, most of it a float32 and a low-precision copy of the centroids and their
    # float64 sums; on a GPU these are in its memory, with the rows that it keeps and the products that it makes at once.
    memory_bytes: int
    gpu_memory_bytes: int = 0  # on a CPU none


def run(settings: ClusterSettings) -> ClusterResult | ClusterCost:
    """Cluster embeddings."""
    seconds = dict[str, float]()
    with open_dist_context(settings.device) as context:
        plan = context.on_rank0(make_plan, settings, seconds)
        if settings.dry_run:
            return _estimate_cost(plan, context)
        with timed(seconds, "read"):
            spec = context.on_rank0(plan.identify)
        with claim_output(context, spec) as output:
            if output.finished is not None:
                reporting.note(f"These clusters are in {plan.folder} already.")
                result = msgspec.convert(output.finished.result, ClusterResult)
            else:
                context.on_rank0(output.begin_work)
                with timed(seconds, "kmeans"):
                    state = _train(plan, context, output.work / PROGRESS)
                with timed(seconds, "assign"):
                    _assign(plan, context, state.centroids_KD, output.work)
                result = context.on_rank0(_write, plan, state, output, seconds)
        files = {
            "centroids": plan.folder / CENTROIDS,
            "clusters": plan.folder / CLUSTERS,
            "sidecar": sidecar_path(plan.folder, "cluster"),
        }
        return msgspec.structs.replace(result, files={name: str(path) for name, path in files.items()})


class Selection:
    """Some of M rows, numbered 0 … N − 1 in their order. Processes send it to each other: 0.13 bytes for each of the M."""

    def __init__(self, is_chosen: BoolArray) -> None:
        """Take the chosen ones of all rows, bool [M]."""
        self._num_all = len(is_chosen)
        self._bits = np.packbits(is_chosen)
        counts = np.add.reduceat(is_chosen, np.arange(0, len(is_chosen), _BLOCK), dtype=np.int64)
        self._before = np.append(0, np.cumsum(counts))

    def __len__(self) -> int:
        return int(self._before[-1])

    def places(self, numbers: IntArray) -> IntArray:
        """Return where chosen rows are among all, by their numbers, which come in any order: int64 [n]."""
        blocks = np.searchsorted(self._before, numbers, side="right") - 1
        order = np.argsort(blocks, kind="stable")
        bounds = np.append(np.flatnonzero(np.diff(blocks[order], prepend=-1)), len(order))
        places = np.empty(len(numbers), np.int64)
        for begin, end in itertools.pairwise(bounds.tolist()):
            here = order[begin:end]
            block = int(blocks[here[0]])
            bits = self._bits[block * _BLOCK // 8 : (block + 1) * _BLOCK // 8]
            chosen = np.flatnonzero(np.unpackbits(bits)) + block * _BLOCK
            places[here] = chosen[numbers[here] - self._before[block]]
        return places

    def subset(self, numbers: IntArray) -> Selection:
        """Return the selection of some of the chosen rows, by their numbers."""
        is_chosen = np.zeros(self._num_all, np.bool_)
        is_chosen[self.places(numbers)] = True
        return Selection(is_chosen)


@dataclasses.dataclass(frozen=True)
class ClusterRows:
    """The rows to cluster, numbered 0 … N − 1 in the order of the embeddings."""

    embeddings: Embeddings
    keep_list: Path | None  # the keep list that chose them; None for all
    chosen: Selection  # which of all rows of the embeddings they are
    joint: bool  # whether the features are joint ones of image and caption
    repair: RepairFigures | None  # what was found of the repair of the teacher; None where nothing was judged
    skips: Skips  # rows that cannot be used
    images: Rows
    texts: Rows | None

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def width(self) -> int:
        return self.embeddings.width

    @property
    def _texts(self) -> Rows:
        assert self.texts is not None  # they are asked for
        return self.texts

    @property
    def towers(self) -> dict[str, Callable[[IntArray], HalfArray]]:
        """What reads the rows of each tower whose nearest centroids are stored."""
        if self.texts is None:
            return {"image": self.features}
        return {"image": self.features, "caption": self.captions}

    def sample(self, count: int, seed: int) -> ClusterRows:
        """Return `count` of the rows, each set of them as likely as another. They share the mapped files."""
        random = np.random.default_rng(derive_seed("cluster rows", seed))
        drawn = np.sort(random.choice(len(self), count, replace=False, shuffle=False))
        return dataclasses.replace(self, chosen=self.chosen.subset(drawn))

    def features(self, numbers: IntArray) -> HalfArray:
        """Read what is clustered of some rows: unit rows, float16 [n, D]."""
        places = self.chosen.places(numbers)
        images = self.images.take(places)
        return joint_features(images, self._texts.take(places)) if self.joint else images

    def captions(self, numbers: IntArray) -> HalfArray:
        """Read the embeddings of the captions of some rows: unit rows, float16 [n, D]."""
        return self._texts.take(self.chosen.places(numbers))

    def keys(self, start: int, stop: int) -> pa.ChunkedArray:
        """Read the keys of rows start … stop − 1, strings."""
        pieces = self.embeddings.take_column(self.embeddings.keys_of, self.chosen.places(np.arange(start, stop)))
        return pa.chunked_array(pieces, pa.large_string())

    def fingerprint(self) -> list[FileRecord]:
        files = self.embeddings.fingerprints([Kind.TEXTS])
        return files if self.keep_list is None else [*files, record(self.keep_list)]


@dataclasses.dataclass(frozen=True)
class ClusterPlan:
    """What is clustered, and into how many clusters."""

    settings: ClusterSettings
    rows: ClusterRows
    trained: ClusterRows  # the rows that centroids are computed from: all, or some drawn ones (--train-rows)
    num_clusters: int

    @property
    def folder(self) -> Path:
        return WorkDirectory(self.settings.work).clusters

    def identify(self) -> OutputSpec[ClusterSidecar]:
        """Say what decides the output; call it on the first process, which hashes the files of another tool."""
        settings, rows = self.settings, self.rows
        identity = {
            "features": settings.features,
            "num_clusters": self.num_clusters,
            "iterations": settings.iterations,
            "train_rows": None if self.trained is rows else settings.train_rows,
            "seed": settings.seed,
            "images": len(rows),
            "keys": rows.embeddings.key_rule,
        }
        return OutputSpec(
            self.folder,
            "cluster",
            ClusterSidecar,
            settings=identity,
            inputs=rows.fingerprint(),
            overwrite=settings.overwrite,
            elsewhere="--work, with --embeddings",
        )

    @property
    def num_nearest(self) -> int:
        """Return m, the number of nearest centroids stored of each image and caption: docs/method.md#soft-labels."""
        return min(NUM_NEAREST, self.num_clusters)


def make_plan(settings: ClusterSettings, seconds: dict[str, float]) -> ClusterPlan:
    """Look at everything that can be wrong, and say what was taken; the time of it is added to `seconds`."""
    with timed(seconds, "read"):
        rows = _choose_rows(settings)
    with timed(seconds, "repair"):
        rows = _repair(rows, settings)
    with timed(seconds, "read"):
        return _plan_clusters(rows, settings)


def _plan_clusters(rows: ClusterRows, settings: ClusterSettings) -> ClusterPlan:
    num_clusters = _choose_num_clusters(settings, rows)
    trained = rows
    if settings.train_rows is not None and settings.train_rows < len(rows):
        trained = rows.sample(settings.train_rows, settings.seed)
        if len(trained) < _MIN_PER_CENTROID * num_clusters and not settings.dry_run:
            reporting.warn(
                f"--train-rows {len(trained):,} gives each of {num_clusters:,} centroids "
                f"{len(trained) / num_clusters:.1f} images, too few to represent the others. Use at least "
                f"{_MIN_PER_CENTROID * num_clusters:,} ({_MIN_PER_CENTROID} per centroid)."
            )
    plan = ClusterPlan(settings, rows, trained, num_clusters)
    if settings.dry_run and is_claimed(plan.folder, "cluster"):  # else files of another tool need not be hashed
        preview_output(plan.identify(), "these clusters", "What follows is of a new run.")
    return plan


def _choose_num_clusters(settings: ClusterSettings, rows: ClusterRows) -> int:
    count = len(rows) if settings.train_rows is None else min(settings.train_rows, len(rows))
    default = min(count, default_num_clusters(len(rows)))
    if settings.num_clusters is None:
        reporting.note(f"Clusters: {default:,}, the default for {len(rows):,} images (--num-clusters).")
        return default
    if settings.num_clusters > count:
        there = f"the {len(rows):,} images to cluster" if count == len(rows) else f"--train-rows {count:,}"
        raise ClipcidError(
            f"--num-clusters {settings.num_clusters:,} is more than {there}.",
            f"Give --num-clusters at most {count:,}; the default would be {default:,}.",
        )
    return settings.num_clusters


def _choose_rows(settings: ClusterSettings) -> ClusterRows:
    """Find the embeddings and the keep list, join them by key and say which were taken."""
    work = WorkDirectory(settings.work)
    scratch = None if settings.dry_run else work.path  # a dry run leaves it as it is
    embeddings = open_kept(settings, scratch)
    folder = embeddings.folder
    if settings.features == "joint" and not embeddings.has_texts:
        raise ClipcidError(
            f"--features joint needs text embeddings, but {folder} has none.",
            f"Use --features image, or embed the captions too. {embeddings.embed_again(text=True)}",
        )
    keep_list = choose_keep_list(settings.keep_list, work, "rows", settings.max_bad_fraction)
    try:
        embeddings.validate_unique_keys()
    except ClipcidError:
        # Where the list is of other data, --keys shard would not help.
        if keep_list is not None and settings.keys == "sample":
            keep_list.validate_related(_prefix_some_keys(embeddings), str(folder))
        raise
    usable = np.ones(embeddings.num_rows, dtype=np.bool_)
    bad = embeddings.find_bad_rows(texts=True)
    usable[bad] = False
    skips = skip_rows(embeddings, bad, settings.max_bad_fraction)
    if keep_list is not None:
        usable &= keep_list.find_kept(
            lambda: map(embeddings.keys_of, embeddings.files), embeddings.num_rows, scratch, str(folder)
        )
    if not usable.any():
        raise ClipcidError(
            f"Nothing is left to cluster: no row of {folder} is kept.", "Give another --keep-list, or --keep-list none."
        )
    return ClusterRows(
        embeddings,
        keep_list=None if keep_list is None else keep_list.path,
        chosen=Selection(usable),
        joint=settings.features == "joint",
        repair=None,
        skips=skips,
        images=embeddings.rows(Kind.IMAGES),
        texts=embeddings.rows(Kind.TEXTS) if embeddings.has_texts else None,
    )


def _repair(rows: ClusterRows, settings: ClusterSettings) -> ClusterRows:
    """Return the rows of the repaired teacher where a repair is better; it concerns its images alone."""
    embeddings, repair = repair_teacher(settings, rows.embeddings)
    return dataclasses.replace(rows, embeddings=embeddings, repair=repair, images=embeddings.rows(Kind.IMAGES))


def _prefix_some_keys(embeddings: Embeddings) -> pa.Array:
    """Return the keys of the first file with rows as ``--keys shard`` makes them."""
    first = next(file for file in embeddings.files if file.rows)
    shards, keys = (read(first).combine_chunks() for read in (embeddings.shards_of, embeddings.keys_of))
    return pc.binary_join_element_wise(shards, keys, pa.scalar("/", keys.type))


def _train(plan: ClusterPlan, context: DistContext, progress: Path) -> LloydState:
    """Run k-means until no centroid moves, or all iterations are done; every process takes its even share of the rows."""
    settings, trained, num_rows = plan.settings, plan.trained, len(plan.rows)

    def begin() -> LloydState:
        saved = load_arrays(progress)
        if saved is None:
            return LloydState(first_centroids(trained, plan.num_clusters, settings.seed))
        iterations = int(saved["iterations"])
        reporting.note(f"Resuming after {iterations} iterations.")
        return LloydState(torch.from_numpy(saved["centroids"]), iterations, bool(saved["converged"]))

    state = context.on_rank0(begin)
    used = f"{len(trained):,}" if len(trained) < num_rows else "all"
    given = " (--train-rows)" if len(trained) < num_rows else ""
    reporting.note(f"Centroids are computed from {used} of the {num_rows:,} images{given}.")
    states = run_lloyd(
        trained,
        state,
        iterations=settings.iterations,
        dtype=choose_coarse_dtype("auto", context.device).dtype,
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
            if context.is_main:
                so_far = {"iterations": state.iterations, "converged": state.converged}
                save_arrays(progress, {"centroids": state.centroids_KD.numpy(), **so_far})
            bar.advance()
            bar.show(similarity=state.similarity, **({"empty": state.num_empty} if state.num_empty else {}))
    return state


def _assign(plan: ClusterPlan, context: DistContext, centroids_KD: torch.Tensor, folder: Path) -> None:
    """Write the parts of the table that are not there yet, or damaged, dealt to the processes."""
    bounds = part_bounds(len(plan.rows))
    mine = range(context.rank, len(bounds), context.size)
    parts = ClusterParts(folder)
    left = [part for part in mine if parts.read(part) is None]
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
            number_Bm, cosine_Bm = top(rows_BD, centroids_KD, plan.num_nearest)
            tops[tower] = number_Bm.cpu().numpy(), cosine_Bm.cpu().numpy()
        return part, part_arrays(tops)

    own, open_ = (sum(bounds[part][1] - bounds[part][0] for part in parts) for parts in (mine, left))
    with reporting.progress("assign", own, "images") as progress:
        progress.advance(own - open_)
        # One set of threads for all parts: new ones for each would share a core until the system has spread them.
        nearest = thread_map(look_up, blocks, threads_for_batches(context.device))
        for part, blocks_of_part in itertools.groupby(nearest, key=itemgetter(0)):
            pieces = [arrays for _, arrays in blocks_of_part]
            arrays = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
            parts.append(part, arrays)
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
            "distinct images than clusters, or fewer. Use a smaller --num-clusters."
        )
    arrays = [path.name for tower in rows.towers for path in top_paths(output.work, tower)]
    output.commit(
        counts={"read": embeddings.num_rows, "used": len(rows), "skipped": rows.skips.counts},
        seconds=seconds,
        outputs=[record(output.work / name, output.work) for name in (CENTROIDS, CLUSTERS, *arrays)],
        embeddings=embeddings.name_in(WorkDirectory(plan.settings.work)),
        keep_list=None if rows.keep_list is None else record(rows.keep_list),
        repair=None if embeddings.image_map is None else embeddings.image_map.record,
        space="stored" if embeddings.image_map is None else "repaired",
        model=embeddings.model,
        num_nearest=plan.num_nearest,
        temperatures=temperatures,
        result=result,
    )
    return result


def _estimate_cost(plan: ClusterPlan, context: DistContext) -> ClusterCost:
    """Count the operations of all iterations, and the memory of a process."""
    settings, rows, num_clusters = plan.settings, plan.rows, plan.num_clusters
    num_trained, width = len(plan.trained), plan.rows.width
    scan = choose_coarse_dtype("auto", context.device).dtype
    integer_bytes = integer_dtype(context.device, scan, width).itemsize
    kept = min(memory_for_rows(context.device), integer_bytes * width * num_trained // context.size)
    working = num_clusters * width * (4 + 8 + integer_bytes) + kept
    memory = _BYTES_OF_LIBRARIES + _BYTES_A_ROW * len(rows)
    on_gpu = 0
    if context.device.type == "cuda":
        own = -(-num_trained // context.size)
        on_gpu = working + bytes_of_products(context.device, own, num_clusters)
        on_gpu += bytes_of_run(context.device, own, width, integer_bytes)
    else:
        memory += working
    flop = 2 * num_trained * num_clusters * width * settings.iterations
    of_gpu = f", {on_gpu / 2**30:.3g} GiB of its GPU" if on_gpu else ""
    reporting.note(
        f"{num_trained:,} images × {num_clusters:,} clusters × width {width}, at most {settings.iterations} iterations: "
        f"{flop:.3g} FLOP; {memory / 2**30:.3g} GiB per process{of_gpu}, besides the mapped files."
    )
    return ClusterCost(images=len(rows), clusters=num_clusters, flop=flop, memory_bytes=memory, gpu_memory_bytes=on_gpu)
