"""Clusters of the images: ``centroids.npy`` and ``clusters.parquet``.

The table is written in parts by any number of processes, each part a parquet file of its own that appears whole, and
joined in order at the end. Where parts begin depends on the number of rows only, so the table's bytes do not depend on
who wrote what, and a killed run continues with the missing parts.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.atomic import atomic_file, write_parquet
from clipcid_cli.formats.output import read_sidecar, refuse_changed, sidecar_path

CENTROIDS = "centroids.npy"
TABLE = "clusters.parquet"
_PROGRESS = ".progress.npz"

_MIN_PART_ROWS = 8192
_MAX_PARTS = 256
_TOPS = {"top_clusters": pa.list_(pa.int32()), "top_similarities": pa.list_(pa.float16())}
_IMAGE_COLUMNS = {"key": pa.string(), "cluster": pa.int32(), "similarity": pa.float32(), **_TOPS}
_CAPTION_COLUMNS = {f"caption_{name}": kind for name, kind in _TOPS.items()}


@dataclasses.dataclass(frozen=True)
class TopClusters:
    """The nearest centroids of some rows, the most similar first.

    Attributes:
        clusters: int32 [N, m].
        similarities: Cosine similarities, float16 [N, m], descending.
    """

    clusters: npt.NDArray[np.int32]
    similarities: npt.NDArray[np.float16]


@dataclasses.dataclass(frozen=True)
class Clusters:
    """A finished `cluster` output.

    Attributes:
        centroids: Unit rows, float32 [K, D], mapped from the file, not read.
        keys: Keys of the clustered images, str [N].
        labels: Nearest centroid of each, int32 [N].
        similarities: Cosine similarity to it, float32 [N].
        images: The m nearest centroids of each image's features (of its joint features, where those were clustered).
        captions: The same for the captions' embeddings; None when there were none.
        image_temperature: τ_T at which softmax(similarity/τ_T) over an image's m centroids has a median perplexity of 3.5.
        sidecar: What ``cluster.json`` says.
    """

    folder: Path
    centroids: npt.NDArray[np.float32]
    keys: npt.NDArray[np.object_]
    labels: npt.NDArray[np.int32]
    similarities: npt.NDArray[np.float32]
    images: TopClusters
    captions: TopClusters | None
    image_temperature: float
    caption_temperature: float | None
    sidecar: dict[str, Any]

    def __reduce__(self) -> tuple[Any, ...]:
        """Let another process open the files itself instead of receiving their rows."""
        return open_clusters, (self.folder,)


def open_clusters(folder: Path) -> Clusters:
    """Read what `cluster` wrote.

    Raises:
        ClipcidError: when the output is unfinished, or its files do not fit together.
    """
    sidecar = read_sidecar(sidecar_path(folder, "cluster"))
    remake = "Run clipcid cluster --overwrite again, or give another folder with --clusters."
    if sidecar is None:
        raise ClipcidError(f"{folder} holds no finished clusters: there is no cluster.json.", "Run: clipcid cluster")
    refuse_changed(folder, "cluster", sidecar, remake)
    try:
        centroids = np.load(folder / CENTROIDS, mmap_mode="r", allow_pickle=False)
        keys = pq.read_table(folder / TABLE, columns=["key"])["key"].to_numpy()
        table = read_part(folder / TABLE)
        temperatures = sidecar["temperatures"]
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise ClipcidError(f"{folder} cannot be read as clusters: {error}", remake) from error
    if int(table.images.clusters.max()) >= len(centroids):
        raise ClipcidError(
            f"{folder / TABLE} names cluster {int(table.images.clusters.max())}; "
            f"{CENTROIDS} has {len(centroids)} centroids.",
            remake,
        )
    return Clusters(
        folder=folder,
        centroids=centroids,
        keys=keys,
        labels=table.labels,
        similarities=table.similarities,
        images=table.images,
        captions=table.captions,
        image_temperature=float(temperatures["image"]),
        caption_temperature=None if table.captions is None else float(temperatures["caption"]),
        sidecar=sidecar,
    )


def part_bounds(num_rows: int) -> list[tuple[int, int]]:
    """Cut rows into the parts the table is written in.

    Returns:
        First row and the one after the last of each part; a function of the number of rows only, at most 256 parts.
    """
    size = max(_MIN_PART_ROWS, -(-num_rows // _MAX_PARTS))
    return [(first, min(num_rows, first + size)) for first in range(0, num_rows, size)]


def part_path(folder: Path, part: int) -> Path:
    """Return the path of a part of the table, until all are joined."""
    return folder / f".{TABLE}.part-{part:03d}"


def write_part(
    path: Path,
    *,
    keys: npt.NDArray[np.object_],
    similarities: npt.NDArray[np.float64],
    images: TopClusters,
    captions: TopClusters | None,
) -> None:
    """Write one part of the table.

    Args:
        path: Where, from :func:`part_path`.
        keys: Keys of its images, str [n].
        similarities: Similarity to the nearest centroid, [n], before its rounding to float16.
        images: Nearest centroids of the images.
        captions: Nearest centroids of the captions, where there are text embeddings.
    """
    columns = {
        "key": pa.array(keys, pa.string()),
        "cluster": pa.array(images.clusters[:, 0], pa.int32()),
        "similarity": pa.array(similarities.astype(np.float32)),
        **_top_columns("", images),
        **({} if captions is None else _top_columns("caption_", captions)),
    }
    write_parquet(path, pa.table(columns))


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the table.

    Attributes:
        labels: Nearest centroid of each image, int32 [n].
        similarities: Cosine similarity to it, float32 [n].
        images: Nearest centroids of the images.
        captions: Nearest centroids of the captions; None when there are none.
    """

    labels: npt.NDArray[np.int32]
    similarities: npt.NDArray[np.float32]
    images: TopClusters
    captions: TopClusters | None


def read_part(path: Path) -> Part:
    """Read a part, or the whole table."""
    table = pq.read_table(path)
    captions = _read_tops(table, "caption_") if "caption_top_clusters" in table.column_names else None
    return Part(table["cluster"].to_numpy(), table["similarity"].to_numpy(), _read_tops(table, ""), captions)


@dataclasses.dataclass(frozen=True)
class KMeansProgress:
    """Centroids of an unfinished run.

    Attributes:
        centroids: float32 [K, D].
        converged: Whether the last one changed nothing.
    """

    centroids: npt.NDArray[np.float32]
    iterations: int
    converged: bool


def write_progress(folder: Path, progress: KMeansProgress) -> None:
    """Save the centroids of an unfinished run, whole or not at all."""
    with atomic_file(folder / _PROGRESS) as file:
        np.savez(file, **dataclasses.asdict(progress))


def read_progress(folder: Path) -> KMeansProgress | None:
    """Read what `write_progress` saved; None when there is nothing."""
    path = folder / _PROGRESS
    if not path.exists():
        return None
    with np.load(path, allow_pickle=False) as saved:
        return KMeansProgress(saved["centroids"], int(saved["iterations"]), bool(saved["converged"]))


def remove_scratch(folder: Path) -> None:
    """Remove what only an unfinished run needs: its progress and its parts."""
    (folder / _PROGRESS).unlink(missing_ok=True)
    for path in folder.glob(f".{TABLE}.part-*"):
        path.unlink()


def join_parts(folder: Path, num_parts: int, *, captions: bool) -> None:
    """Join the parts into ``clusters.parquet``, one row group each. The parts stay: remove them after the commit."""
    columns = _IMAGE_COLUMNS | (_CAPTION_COLUMNS if captions else {})
    with (
        atomic_file(folder / TABLE) as file,
        pq.ParquetWriter(file, pa.schema(list(columns.items())), compression="zstd") as writer,
    ):
        for part in range(num_parts):
            writer.write_table(pq.read_table(part_path(folder, part)))


def _top_columns(prefix: str, tops: TopClusters) -> dict[str, pa.Array]:
    rows, width = tops.clusters.shape
    offsets = pa.array(np.arange(0, (rows + 1) * width, width, dtype=np.int32))
    return {
        f"{prefix}top_clusters": pa.ListArray.from_arrays(offsets, pa.array(tops.clusters.reshape(-1), pa.int32())),
        f"{prefix}top_similarities": pa.ListArray.from_arrays(
            offsets, pa.array(tops.similarities.reshape(-1), pa.float16())
        ),
    }


def _read_tops(table: pa.Table, prefix: str) -> TopClusters:
    def read(name: str) -> npt.NDArray[Any]:
        column = table[f"{prefix}{name}"].combine_chunks()
        values: npt.NDArray[Any] = column.flatten().to_numpy(zero_copy_only=False)
        return values.reshape(len(table), -1)

    return TopClusters(read("top_clusters"), read("top_similarities"))
