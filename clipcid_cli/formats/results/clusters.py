"""Clusters of the images: ``centroids.npy``, ``clusters.parquet``, and its nearest centroids once more as arrays.

The table is written in parts by any number of processes, each part a parquet file of its own that appears whole, and
joined in order at the end. Where parts begin depends on the number of rows only, so the table's bytes do not depend on
who wrote what, and a killed run continues with the missing parts.

Parquet cannot be read row by row: its columns of nearest centroids are also stored as arrays that are mapped, one copy for
all processes of a host. ``top_arrays.json`` records the table and the arrays made from it; where any of these files is
missing or has changed, the arrays are made again, in a folder of the reader's own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.arrays import load_arrays, save_arrays
from clipcid_cli.formats.atomic import atomic_file, remove_abandoned, write_parquet
from clipcid_cli.formats.fingerprint import FileRecord, find_changed, record, refuse_changed
from clipcid_cli.formats.parquet import read_columns
from clipcid_cli.formats.reading import describe, open_regular
from clipcid_cli.formats.sidecar import ClusterSidecar, read_sidecar, sidecar_path
from clipcid_cli.formats.work_directory import remake_clusters

CENTROIDS = "centroids.npy"
TABLE = "clusters.parquet"
ARRAYS_RECORD = "top_arrays.json"
_PROGRESS = ".progress.npz"

_MIN_PART_ROWS = 8192
_MAX_PARTS = 256
_TOPS = {"top_clusters": pa.list_(pa.int32()), "top_similarities": pa.list_(pa.float16())}
_IMAGE_COLUMNS = {"key": pa.string(), "cluster": pa.int32(), "similarity": pa.float32(), **_TOPS}
_CAPTION_COLUMNS = {f"caption_{name}": kind for name, kind in _TOPS.items()}


class _ArraysRecord(msgspec.Struct):
    files: list[FileRecord]


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
        images: Mapped likewise: the m nearest centroids of each image's features (of its joint features, where those were
            clustered).
        captions: The same for the captions' embeddings; None when there were none.
        image_temperature: τ_T at which softmax(similarity/τ_T) over an image's m centroids has a median perplexity of 3.5.
        sidecar: What ``cluster.json`` says.
        cache: Where the arrays are if the folder itself lacks them.
    """

    folder: Path
    centroids: npt.NDArray[np.float32]
    images: TopClusters
    captions: TopClusters | None
    image_temperature: float
    caption_temperature: float | None
    sidecar: ClusterSidecar
    cache: Path

    @property
    def labels(self) -> npt.NDArray[np.int32]:
        """Nearest centroid of each clustered image, int32 [N]."""
        return self.images.clusters[:, 0]

    def __reduce__(self) -> tuple[Any, ...]:
        """Let another process open the files itself instead of receiving their rows."""
        return open_clusters, (self.folder, self.cache, True)


def read_cluster_sidecar(folder: Path) -> ClusterSidecar:
    """Read the sidecar of finished clusters; where there are none, that is a ClipcidError."""
    sidecar = read_sidecar(sidecar_path(folder, "cluster"), ClusterSidecar)
    if sidecar is None:
        raise ClipcidError(
            f"{folder} holds no finished clusters: there is no cluster.json.",
            "Name another folder with --clusters, or omit it for those in the work directory.",
        )
    return sidecar


def open_clusters(folder: Path, cache: Path, is_checked: bool = False, work: Path | None = None) -> Clusters:
    """Read what `cluster` wrote; nothing is written to its folder.

    Args:
        cache: Folder for the arrays of tables that have none, or others, in their own folder: each in one of its own.
        is_checked: Whether the centroids are known to be finite, so that they need not be read.
        work: The work directory of the step, for the fix of an error.
    """
    sidecar = read_cluster_sidecar(folder)

    def remake() -> str:
        return remake_clusters(folder, sidecar, work)

    refuse_changed(folder, sidecar.outputs, sidecar_path(folder, "cluster"), remake)
    try:
        for name in (CENTROIDS, TABLE):
            open_regular(folder / name).close()
        centroids = np.load(folder / CENTROIDS, mmap_mode="r", allow_pickle=False)
        if centroids.ndim != 2 or centroids.dtype != np.float32 or not (is_checked or _are_finite(centroids)):
            raise ValueError(f"{CENTROIDS} holds {centroids.dtype} {list(centroids.shape)}, not finite float32 [K, D]")
        with pq.ParquetFile(folder / TABLE) as table:
            most = _largest_cluster(table)
            arrays = _find_arrays(folder, cache, table)
            has_captions = "caption_top_clusters" in table.schema_arrow.names
        tops = [map_tops(arrays, prefix) for prefix in ("", *(["caption_"] if has_captions else []))]
        temperatures = [sidecar.temperatures[tower] for tower in ("image", *(["caption"] * has_captions))]
    except ClipcidError:  # the arrays could not be written
        raise
    except Exception as error:  # numpy and pyarrow raise what they like for a damaged file
        raise ClipcidError(f"{folder} cannot be read as clusters: {describe(error)}.", remake()) from error
    if most >= len(centroids):
        raise ClipcidError(
            f"{folder / TABLE} names cluster {most}; {CENTROIDS} has {len(centroids)} centroids.",
            remake(),
        )
    return Clusters(
        folder=folder,
        centroids=centroids,
        images=tops[0],
        captions=tops[1] if has_captions else None,
        image_temperature=temperatures[0],
        caption_temperature=temperatures[1] if has_captions else None,
        sidecar=sidecar,
        cache=cache,
    )


def _are_finite(rows: npt.NDArray[np.float32]) -> bool:
    return all(np.isfinite(rows[start : start + _MIN_PART_ROWS]).all() for start in range(0, len(rows), _MIN_PART_ROWS))


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
    keys: pa.Array | pa.ChunkedArray,
    similarities: npt.NDArray[np.float64],
    images: TopClusters,
    captions: TopClusters | None,
) -> None:
    """Write one part of the table.

    Args:
        path: Where, from :func:`part_path`.
        keys: Keys of its n images, strings.
        similarities: Similarity to the nearest centroid, [n], before its rounding to float16.
        images: Nearest centroids of the images.
        captions: Nearest centroids of the captions, where there are text embeddings.
    """
    columns = {
        "key": keys.cast(pa.string()),
        "cluster": pa.array(images.clusters[:, 0], pa.int32()),
        "similarity": pa.array(similarities.astype(np.float32)),
        **_top_columns("", images),
        **({} if captions is None else _top_columns("caption_", captions)),
    }
    write_parquet(path, pa.table(columns))


def read_part(path: Path) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Read from a part the nearest centroid of each image and its similarity, [n] each."""
    table = pq.read_table(path, columns=["cluster", "similarity"])
    return table["cluster"].to_numpy(), table["similarity"].to_numpy()


def read_labels(table: Path) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Read from the table the nearest centroid of each image and its similarity, [N] each."""
    kinds = {"cluster": pa.int32(), "similarity": pa.float32()}
    found = read_columns(table, kinds, "Make the clusters again, by their command and --overwrite.")
    return found["cluster"].to_numpy(), found["similarity"].to_numpy()


def map_tops(folder: Path, prefix: str) -> TopClusters:
    """Map the nearest centroids of the images (prefix ``""``) or of the captions (``caption_``).

    Raises:
        ValueError: when there is not one similarity for each of them.
    """
    clusters, similarities = (
        np.asarray(np.load(_array_path(folder, f"{prefix}{name}"), mmap_mode="r", allow_pickle=False)) for name in _TOPS
    )
    if clusters.shape != similarities.shape:
        shapes = f"{list(clusters.shape)}, {prefix}top_similarities {list(similarities.shape)}"
        raise ValueError(f"{prefix}top_clusters is {shapes}")
    return TopClusters(clusters, similarities)


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
    """Save the centroids of an unfinished run."""
    save_arrays(folder / _PROGRESS, dataclasses.asdict(progress))


def read_progress(folder: Path) -> KMeansProgress | None:
    """Read what `write_progress` saved; None when there is nothing: the run then starts over."""
    saved = load_arrays(folder / _PROGRESS)
    if saved is None:
        return None
    return KMeansProgress(saved["centroids"], int(saved["iterations"]), bool(saved["converged"]))


def remove_caption_arrays(folder: Path) -> None:
    """Remove the arrays of captions; a table that has them still has its own."""
    for name in _CAPTION_COLUMNS:
        _array_path(folder, name).unlink(missing_ok=True)


def join_parts(folder: Path, num_parts: int, *, captions: bool) -> None:
    """Join the parts into ``clusters.parquet``, one row group each, and its arrays."""
    columns = _IMAGE_COLUMNS | (_CAPTION_COLUMNS if captions else {})
    paths = [part_path(folder, part) for part in range(num_parts)]
    num_rows = sum(pq.read_metadata(path).num_rows for path in paths)
    with (
        _top_arrays(folder, num_rows, captions=captions) as append,
        atomic_file(folder / TABLE) as file,
        pq.ParquetWriter(file, pa.schema(list(columns.items())), compression="zstd") as writer,
    ):
        for path in paths:
            part = pq.read_table(path)
            writer.write_table(part)
            append(part)
    _record_arrays(folder, folder, columns)


def _top_columns(prefix: str, tops: TopClusters) -> dict[str, pa.Array]:
    rows, width = tops.clusters.shape
    offsets = pa.array(np.arange(0, (rows + 1) * width, width, dtype=np.int32))
    return {
        f"{prefix}top_clusters": pa.ListArray.from_arrays(offsets, pa.array(tops.clusters.reshape(-1), pa.int32())),
        f"{prefix}top_similarities": pa.ListArray.from_arrays(
            offsets, pa.array(tops.similarities.reshape(-1), pa.float16())
        ),
    }


def _array_path(folder: Path, column: str) -> Path:
    return folder / f"{column}.npy"


def _top_names(names: Iterable[str]) -> list[str]:
    return [name for name in (*_TOPS, *_CAPTION_COLUMNS) if name in names]


def _find_arrays(folder: Path, cache: Path, table: pq.ParquetFile) -> Path:
    """Return the folder of a table's arrays: its own, else one in the cache, where they are made if they are not there."""
    if _are_mappable(folder, folder, table):
        return folder
    arrays = cache / record(folder / TABLE).hash.rpartition(":")[2]
    if not _are_mappable(folder, arrays, table):
        _extract_tops(folder, arrays, table)
    return arrays


def _are_mappable(folder: Path, arrays: Path, table: pq.ParquetFile) -> bool:
    """Tell whether each column of nearest centroids has its array, made from this very table and unchanged since."""
    needed = {TABLE, *(_array_path(folder, name).name for name in _top_names(table.schema_arrow.names))}
    try:
        recorded = msgspec.json.decode((arrays / ARRAYS_RECORD).read_bytes(), type=_ArraysRecord).files
    except PermissionError:  # they are there
        raise
    except (OSError, msgspec.MsgspecError):  # missing or damaged: the arrays are made again
        return False
    return needed == {each.path for each in recorded} and not any(
        find_changed(folder if each.path == TABLE else arrays, [each], arrays / ARRAYS_RECORD) for each in recorded
    )


def _extract_tops(folder: Path, arrays: Path, table: pq.ParquetFile) -> None:
    """Write the arrays of a table to another folder."""
    names = _top_names(table.schema_arrow.names)
    captions = "caption_top_clusters" in names
    remove_abandoned(arrays.glob(".*.partial"))
    with _top_arrays(arrays, table.metadata.num_rows, captions=captions, shared=True) as append:  # by several at once
        for group in range(table.num_row_groups):
            append(table.read_row_group(group, columns=names))
    _record_arrays(folder, arrays, names, shared=True)


def _record_arrays(folder: Path, arrays: Path, columns: Iterable[str], shared: bool = False) -> None:
    """Record the table and the arrays made from it, such that `_are_mappable` recognises them."""
    files = [record(folder / TABLE, folder)]
    files += [record(_array_path(arrays, name), arrays) for name in _top_names(columns)]
    with atomic_file(arrays / ARRAYS_RECORD, shared) as file:
        file.write(msgspec.json.format(msgspec.json.encode(_ArraysRecord(files))) + b"\n")


@contextmanager
def _top_arrays(
    folder: Path, num_rows: int, *, captions: bool, shared: bool = False
) -> Iterator[Callable[[pa.Table], None]]:
    """Write the arrays of nearest centroids: yields what appends the next rows of the table to them."""
    with ExitStack() as stack:
        names = [*_TOPS, *(_CAPTION_COLUMNS if captions else [])]
        files = {name: stack.enter_context(atomic_file(_array_path(folder, name), shared)) for name in names}

        def append(rows: pa.Table) -> None:
            for name, file in files.items():
                for chunk in rows[name].chunks:
                    values = chunk.flatten().to_numpy(zero_copy_only=False)
                    values = values.reshape(len(chunk), -1)
                    if not file.tell():
                        kind = np.lib.format.dtype_to_descr(values.dtype)
                        header = {"descr": kind, "fortran_order": False, "shape": (num_rows, values.shape[1])}
                        np.lib.format.write_array_header_1_0(file, header)
                    file.write(values.data)

        yield append


def _largest_cluster(table: pq.ParquetFile) -> int:
    """Return the largest number of a cluster that a table holds, from its statistics: its rows are not read."""
    groups = [table.metadata.row_group(group) for group in range(table.num_row_groups)]
    columns = [group.column(column) for group in groups for column in range(group.num_columns)]
    return max(int(column.statistics.max) for column in columns if column.path_in_schema.startswith("top_clusters."))
