"""Clusters of the images: ``centroids.npy``, ``clusters.parquet``, and the nearest centroids of its rows as arrays.

The arrays are ``top_clusters.npy`` and ``top_similarities.npy`` and, of captions where those are embedded, the same after
``caption_``. They are mapped, one copy for all processes of a host.

Table and arrays are written in parts by any number of processes, each part a file of its own that appears whole, and
joined in order at the end. Where parts begin depends on the number of rows only, so the bytes do not depend on who wrote
what, and a killed run continues with the missing parts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.arrays import array_journal
from clipcid_cli.formats.files import atomic_file, reading
from clipcid_cli.formats.fingerprint import FileRecord, validate_unchanged
from clipcid_cli.formats.parquet import count_rows
from clipcid_cli.formats.sidecar import Sidecar, read_sidecar, run_again, sidecar_path
from clipcid_cli.formats.work_directory import CLUSTERS, FolderName
from clipcid_cli.records import ModelRecord

CENTROIDS = "centroids.npy"
PROGRESS = ".progress.npz"
"""Centroids of an unfinished run."""

_SCHEMA = pa.schema([("key", pa.string()), ("cluster", pa.int32()), ("similarity", pa.float32())])
_PREFIXES = {"image": "", "caption": "caption_"}
_AGAIN = "Run their command again with --overwrite."
_MIN_PART_ROWS = 8192
_MAX_PARTS = 256


class ClusterSidecar(Sidecar, kw_only=True):
    """``cluster.json``."""

    embeddings: FolderName  # relative to the work directory
    keep_list: FileRecord | None  # None where all images were clustered
    model: ModelRecord | None  # None for embeddings of another tool
    # The map by which the teacher's image rows were repaired; None where they were taken as they are.
    repair: FileRecord | None = None
    # Which image rows centroids and similarities are of: ``stored``, as in the embeddings' files, or ``repaired``.
    space: str | None = None
    num_nearest: int
    temperatures: dict[str, float]  # by tower, τ_T of the soft labels
    result: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class TopClusters:
    """The nearest centroids of some rows and the cosine similarities to them, [N, m], the most similar first."""

    clusters: npt.NDArray[np.int32]
    similarities: npt.NDArray[np.float16]


@dataclasses.dataclass(frozen=True)
class Clusters:
    """A finished `cluster` output; arrays are mapped, not read."""

    folder: Path
    centroids: npt.NDArray[np.float32]  # unit rows, [K, D]
    images: TopClusters  # of their joint features, where those were clustered
    captions: TopClusters | None  # None where captions were not embedded
    sidecar: ClusterSidecar

    @property
    def labels(self) -> npt.NDArray[np.int32]:
        """Nearest centroid of each clustered image, int32 [N]."""
        return self.images.clusters[:, 0]

    def __reduce__(self) -> tuple[Any, ...]:
        """Let another process open the files itself instead of receiving their rows."""
        return open_clusters, (self.folder, True)


def read_cluster_sidecar(folder: Path) -> ClusterSidecar:
    """Read the sidecar of clusters, which must be finished."""
    sidecar = read_sidecar(sidecar_path(folder, "cluster"), ClusterSidecar)
    if sidecar is None:
        raise ClipcidError(
            f"{folder} holds no finished clusters: there is no cluster.json.",
            "Name another folder with --clusters, or omit it for those in the work directory.",
        )
    return sidecar


def open_clusters(folder: Path, is_checked: bool = False) -> Clusters:
    """Open what `cluster` wrote; output that is unfinished, or whose files do not fit together, is an error.

    Args:
        is_checked: Whether the centroids are known to be finite, so that they need not be read.
    """
    sidecar = read_cluster_sidecar(folder)
    fix = run_again("cluster", sidecar)
    validate_unchanged(folder, sidecar.outputs, sidecar_path(folder, "cluster"), fix)
    num_rows = count_rows(folder / CLUSTERS, fix)
    with reading(folder / CENTROIDS, "centroids", fix):
        # Here and below: without objects nothing of a file runs, and what is mapped takes no memory, whatever it promises.
        centroids = np.load(folder / CENTROIDS, mmap_mode="r", allow_pickle=False)
        if centroids.ndim != 2 or centroids.dtype != np.float32 or not (is_checked or _are_finite(centroids)):
            raise ValueError(f"it holds {centroids.dtype} {list(centroids.shape)}, not finite float32 [K, D]")
    tops = {tower: map_tops(folder, tower, num_rows, fix) for tower in sidecar.temperatures}
    return Clusters(folder, centroids, tops["image"], tops.get("caption"), sidecar)


def _are_finite(rows: npt.NDArray[np.float32]) -> bool:
    return all(np.isfinite(rows[start : start + _MIN_PART_ROWS]).all() for start in range(0, len(rows), _MIN_PART_ROWS))


def map_tops(folder: Path, tower: str, num_rows: int, fix: str = _AGAIN) -> TopClusters:
    """Map the nearest centroids of the images (``image``) or of the captions (``caption``), of the rows of the table."""
    arrays = list[npt.NDArray[Any]]()
    for path, kind in zip(top_paths(folder, tower), ("int32", "float16"), strict=True):
        with reading(path, "nearest centroids", fix):
            array = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
            width = arrays[0].shape[1] if arrays else array.shape[-1]
            if array.dtype != kind or array.shape != (num_rows, width):
                raise ValueError(f"it holds {array.dtype} {list(array.shape)}; {CLUSTERS} has {num_rows:,} rows")
            arrays.append(array)
    return TopClusters(*arrays)


def top_paths(folder: Path, tower: str) -> tuple[Path, Path]:
    """Return where the numbers of the nearest centroids and their similarities are."""
    prefix = _PREFIXES[tower]
    return folder / f"{prefix}top_clusters.npy", folder / f"{prefix}top_similarities.npy"


def read_label_parts(folder: Path) -> Iterator[tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]]:
    """Read nearest centroids and similarities from the table of a folder, part by part, as it was written."""
    with pq.ParquetFile(folder / CLUSTERS) as table:
        for group in range(table.num_row_groups):
            part = table.read_row_group(group, columns=["cluster", "similarity"])
            yield part["cluster"].to_numpy(), part["similarity"].to_numpy()


def part_bounds(num_rows: int) -> list[tuple[int, int]]:
    """Return the first row and the one after the last of each part: at most 256, by the number of rows only."""
    size = max(_MIN_PART_ROWS, -(-num_rows // _MAX_PARTS))
    return [(first, min(num_rows, first + size)) for first in range(0, num_rows, size)]


class ClusterParts:
    """The parts that are done in a folder, by number, until all are joined."""

    def __init__(self, folder: Path) -> None:
        self._journal = array_journal(folder / ".parts")

    def append(self, part: int, arrays: dict[str, npt.NDArray[Any]]) -> None:
        """Save what `part_arrays` names."""
        self._journal.append(f"{part:03d}", arrays)

    def read(self, part: int) -> dict[str, npt.NDArray[Any]] | None:
        """Return a part; None where it is not done."""
        return self._journal.read(f"{part:03d}")


def part_arrays(tops: dict[str, tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]]) -> dict[str, npt.NDArray[Any]]:
    """Name what is stored of n rows: by tower the nearest centroids and the similarities to them, [n, m] each."""
    arrays: dict[str, npt.NDArray[Any]] = {"similarity": tops["image"][1][:, 0].astype(np.float32)}
    for tower, (clusters, similarities) in tops.items():
        names = (path.stem for path in top_paths(Path(), tower))
        arrays |= zip(names, (clusters.astype(np.int32), similarities.astype(np.float16)), strict=True)
    return arrays


def join_parts(folder: Path, bounds: list[tuple[int, int]], keys: Callable[[int, int], pa.ChunkedArray]) -> None:
    """Join the parts into ``clusters.parquet``, one row group each, and the arrays; `keys` reads the keys of bounds."""
    files: dict[str, IO[bytes]] = {}
    parts = ClusterParts(folder)
    with ExitStack() as stack:
        table = stack.enter_context(atomic_file(folder / CLUSTERS))
        writer = stack.enter_context(pq.ParquetWriter(table, _SCHEMA, compression="zstd"))
        for index, (first, last) in enumerate(bounds):
            part = parts.read(index)
            if part is None:
                raise ClipcidError(
                    f"Part {index} of {folder / CLUSTERS} cannot be read.", "Run the same command again."
                )
            columns = [keys(first, last), part["top_clusters"][:, 0], part.pop("similarity")]
            writer.write_table(pa.table(columns, schema=_SCHEMA))
            for name, rows in part.items():
                if name not in files:
                    files[name] = stack.enter_context(atomic_file(folder / f"{name}.npy"))
                    shape = bounds[-1][1], rows.shape[1]
                    header = {"descr": rows.dtype.str, "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(files[name], header)
                files[name].write(rows.data)
