"""What `cluster` works on: which embeddings, which of their rows are kept, and into how many clusters they are put."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clipcid_cli.algorithms.kmeans.kmeans import default_num_clusters, joint_features
from clipcid_cli.algorithms.near.exact import BoolArray, HalfArray, IntArray
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.embeddings.command import data_command
from clipcid_cli.formats.embeddings.folder import Embeddings
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.formats.embeddings.rows import Rows
from clipcid_cli.formats.fingerprint import FileRecord, record
from clipcid_cli.formats.output import OutputSpec, find_output, is_claimed
from clipcid_cli.formats.sidecar import ClusterSidecar, RepairFigures
from clipcid_cli.formats.skips import Skips
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.runtime.randomness import derive_seed
from clipcid_cli.steps import reporting
from clipcid_cli.steps.inputs import choose_keep_list, open_teachers, skip_rows
from clipcid_cli.steps.repair import repair_teacher
from clipcid_cli.steps.settings.cluster import ClusterSettings

# As many as faiss asks for before it warns.
_MIN_PER_CENTROID = 39
NUM_NEAREST = 16
# Rows of which the chosen ones are counted.
_BLOCK = 4096


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
        found = np.empty(len(numbers), np.int64)
        for begin, end in pairwise(bounds.tolist()):
            here = order[begin:end]
            block = int(blocks[here[0]])
            bits = self._bits[block * _BLOCK // 8 : (block + 1) * _BLOCK // 8]
            chosen = np.flatnonzero(np.unpackbits(bits)) + block * _BLOCK
            found[here] = chosen[numbers[here] - self._before[block]]
        return found

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
        found = self.embeddings.fingerprints([Kind.TEXTS])
        return found if self.keep_list is None else [*found, record(self.keep_list)]


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


def make_plan(settings: ClusterSettings) -> ClusterPlan:
    """Look at everything that can be wrong, and say what was taken."""
    rows = _choose_rows(settings)
    num_clusters = _choose_num_clusters(settings, rows)
    trained = rows
    if settings.train_rows is not None and settings.train_rows < len(rows):
        trained = rows.sample(settings.train_rows, settings.seed)
        if len(trained) < _MIN_PER_CENTROID * num_clusters and not settings.dry_run:
            reporting.warn(
                f"--train-rows {len(trained):,} gives each of {num_clusters:,} centroids "
                f"{len(trained) / num_clusters:.1f} images, too few to represent the others. Use at least "
                f"{_MIN_PER_CENTROID * num_clusters:,} ({_MIN_PER_CENTROID} a centroid)."
            )
    plan = ClusterPlan(settings, rows, trained, num_clusters)
    if settings.dry_run and is_claimed(plan.folder, "cluster"):
        find_output(plan.identify())
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
    folders = settings.embeddings or (work.find_embeddings(),)
    cache = None if settings.dry_run else work.fingerprints
    scratch = None if settings.dry_run else work.path  # a dry run leaves it as it is
    embeddings = open_teachers(settings, folders, cache, scratch)
    folder = embeddings.folder
    if settings.features == "joint" and not embeddings.has_texts:
        raise ClipcidError(
            f"--features joint needs text embeddings, but {folder} has none.",
            f"Use --features image, or embed the captions too: {data_command(folder, embeddings.sidecar, text=True)}",
        )
    keep_list = choose_keep_list(settings.keep_list, work, "rows", settings.max_bad_fraction)
    try:
        for member in embeddings.members:
            member.validate_unique_keys()
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
    embeddings, repair = repair_teacher(settings, embeddings)
    return ClusterRows(
        embeddings,
        keep_list=None if keep_list is None else keep_list.path,
        chosen=Selection(usable),
        joint=settings.features == "joint",
        repair=repair,
        skips=skips,
        images=embeddings.rows(Kind.IMAGES),
        texts=embeddings.rows(Kind.TEXTS) if embeddings.has_texts else None,
    )


def _prefix_some_keys(embeddings: Embeddings) -> pa.Array:
    """Return the keys of the first file with rows as ``--keys shard`` makes them."""
    first = next(file for file in embeddings.files if file.rows)
    shards, keys = (read(first).combine_chunks() for read in (embeddings.shards_of, embeddings.keys_of))
    return pc.binary_join_element_wise(shards, keys, pa.scalar("/", keys.type))
