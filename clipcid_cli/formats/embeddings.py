"""Embeddings on disk, in the layout of clip-retrieval and embedding-reader.

    img_emb/img_emb_0000.npy        float16 [n, D], unit rows
    text_emb/text_emb_0000.npy      the same, of the captions
    metadata/metadata_0000.parquet  key, shard, caption; row i belongs to row i of both

One set of files per shard. Folders made by other tools are read as they are: rows of another number format, or that are not
unit, are normalised and cast to float16 as they are read, each row by itself.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.key_join import find_repeated_key
from clipcid_cli.formats.output import read_sidecar, sidecar_path
from clipcid_cli.formats.samples import natural_key

Float16 = npt.NDArray[np.float16]

BLOCK_ROWS = 65_536

_ROWS_IN_CACHE = 512

# A float16 row whose norm is this close to 1 is taken as it is: rounding D ≤ 4,096 unit-row entries moves it by less.
_UNIT_TOLERANCE = 2e-3


@dataclasses.dataclass(frozen=True)
class EmbeddingFile:
    """The files of one shard.

    Attributes:
        images: npy of image embeddings.
        texts: npy of text embeddings, where there are any.
        metadata: parquet of keys and captions, where there is one.
        first: Number of its first row among all rows.
        rows: Number of its rows.
    """

    images: Path
    texts: Path | None
    metadata: Path | None
    first: int
    rows: int


class Rows:
    """Rows [N, D] that lie in several files, mapped into memory; read in slices or picked one by one.

    Attributes:
        shape: (N, D).
    """

    def __init__(self, files: list[npt.NDArray[Any]], width: int, as_stored: bool) -> None:
        self._files = files
        # Whether a file's rows need no normalising; None until it is looked through, once.
        self._is_unit: list[bool | None] = [as_stored or None] * len(files)
        self._starts = np.concatenate([[0], np.cumsum([len(file) for file in files], dtype=np.int64)])
        self.shape = (int(self._starts[-1]), width)

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, start: int, stop: int) -> Float16:
        """Return rows start … stop − 1, float16 [n, D]; a view of the file where they lie in one, unit rows always."""
        parts = []
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        for number in range(max(0, first), len(self._files)):
            begin = int(self._starts[number])
            if begin >= stop:
                break
            part = self._files[number][max(0, start - begin) : stop - begin]
            if len(part):
                parts.append(self._unit(number, part))
        if not parts:
            return np.empty((0, self.shape[1]), dtype=np.float16)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def take(self, positions: npt.NDArray[np.int64]) -> Float16:
        """Return the rows at `positions` (int64 [n], any order), float16 [n, D]."""
        rows = np.empty((len(positions), self.shape[1]), dtype=np.float16)
        owners = np.searchsorted(self._starts, positions, side="right") - 1
        for number in np.unique(owners):
            wanted = np.flatnonzero(owners == number)
            part = self._files[number][positions[wanted] - self._starts[number]]
            rows[wanted] = self._unit(int(number), part)
        return rows

    def _unit(self, number: int, part: npt.NDArray[Any]) -> Float16:
        if self._is_unit[number] is None:
            self._is_unit[number] = holds_unit_rows(self._files[number])
        return part if self._is_unit[number] else unit_rows(part)

    def blocks(self, size: int = BLOCK_ROWS) -> Iterator[tuple[int, Float16]]:
        """Yield (number of the first row, rows) for consecutive blocks of `size` rows; the last may be shorter."""
        for start in range(0, len(self), size):
            yield start, self.read(start, min(start + size, len(self)))


class Embeddings:
    """The embeddings of one model over one data set.

    Attributes:
        folder: Where they lie.
        files: Its files, in order of rows.
        num_rows: N.
        width: D.
        sidecar: What `embed` wrote of them; None for a folder of another tool.
    """

    def __init__(
        self,
        folder: Path,
        files: tuple[EmbeddingFile, ...],
        width: int,
        sidecar: dict[str, Any] | None,
        prefix_keys: bool = False,
    ) -> None:
        self.folder, self.files, self.width, self.sidecar = folder, files, width, sidecar
        self._prefix_keys = prefix_keys and sidecar is None
        self.num_rows = sum(file.rows for file in files)

    @property
    def has_texts(self) -> bool:
        """Whether there are text embeddings beside the image embeddings."""
        return all(file.texts is not None for file in self.files)

    def images(self) -> Rows:
        """Map the image embeddings."""
        return self._map(lambda file: file.images)

    def texts(self) -> Rows:
        """Map the text embeddings, row-aligned with the images.

        Raises:
            ClipcidError: when there are none.
        """
        if not self.has_texts:
            raise ClipcidError(
                f"{self.folder} holds no text embeddings.",
                "Make them with: clipcid embed DATA --text --overwrite (the data needs captions).",
            )
        return self._map(lambda file: file.texts)

    @cached_property
    def keys(self) -> pa.ChunkedArray:
        """Keys of the rows, N strings: column ``key``, else ``image_path``, else file and row."""
        keys = self._column(("key", "image_path"), lambda file, row: f"{file.images.stem}/{row}")
        if not self._prefix_keys:
            return keys
        slash = pa.scalar("/", type=pa.large_string())
        joined = pc.binary_join_element_wise(self.shards.combine_chunks(), keys.combine_chunks(), slash)
        return pa.chunked_array([joined], type=pa.large_string())

    @cached_property
    def shards(self) -> pa.ChunkedArray:
        """Names of the rows' shards, N strings; the file's name where another tool did not record them."""
        return self._column(("shard",), lambda file, row: file.images.stem)

    @cached_property
    def captions(self) -> pa.ChunkedArray:
        """Captions of the rows, N strings; empty where there is none."""
        return self._column(("caption",), lambda file, row: "")

    def captions_by_file(self) -> Iterator[tuple[EmbeddingFile, pa.ChunkedArray]]:
        """Yield each file with the captions of its rows, empty where there is none, one file in memory at a time."""
        for file in self.files:
            yield file, self._column(("caption",), lambda file, row: "", (file,))

    def refuse_repeated_keys(self) -> None:
        """Refuse keys that name two rows, in a folder of another tool; `embed` has looked already.

        Raises:
            ClipcidError: when there are any.
        """
        repeat = None if self.sidecar is not None else find_repeated_key(self.keys)
        if repeat is not None:
            key, one, other = repeat
            raise ClipcidError(
                f"Key {key!r} names rows {one:,} and {other:,} of {self.folder}.",
                "Add --keys shard, which puts the shard's name before each key, or give the rows keys that differ.",
            )

    def find_bad_rows(self) -> npt.NDArray[np.int64]:
        """Find rows that are not finite (or were zero): nothing can be said of their distance to others.

        Rows that `embed` wrote are finite already, so its folders are not read for this.
        """
        if self.sidecar is not None:
            return np.empty(0, dtype=np.int64)
        bad = [start + np.flatnonzero(~np.isfinite(rows).all(axis=1)) for start, rows in self.images().blocks()]
        return np.concatenate(bad) if bad else np.empty(0, dtype=np.int64)

    def _map(self, choose: Callable[[EmbeddingFile], Path | None]) -> Rows:
        paths = [choose(file) for file in self.files]
        return Rows([_map_npy(path) for path in paths if path is not None], self.width, self.sidecar is not None)

    def _column(
        self,
        names: tuple[str, ...],
        default: Callable[[EmbeddingFile, int], str],
        files: tuple[EmbeddingFile, ...] | None = None,
    ) -> pa.ChunkedArray:
        chunks: list[pa.Array] = []
        for file in self.files if files is None else files:
            present = pq.read_schema(file.metadata).names if file.metadata is not None else []
            name = next((name for name in names if name in present), None)
            if name is None:
                chunks.append(pa.array([default(file, row) for row in range(file.rows)], type=pa.large_string()))
            else:
                column = pq.read_table(file.metadata, columns=[name])[name].cast(pa.large_string())
                chunks.extend(column.fill_null("").chunks)
        return pa.chunked_array(chunks, type=pa.large_string())


def open_embeddings(folder: Path, keys: str = "sample") -> Embeddings:
    """Open a folder of embeddings.

    Args:
        folder: One that `embed` finished, or one of clip-retrieval or embedding-reader: ``img_emb/*.npy`` with
            ``metadata/*.parquet`` (and ``text_emb/*.npy``) of the same numbers, or a folder of bare ``.npy``.
        keys: ``shard`` puts the shard's name before each key of another tool's folder, where keys repeat across shards;
            `embed` has done so already where it was told to.

    Raises:
        ClipcidError: when there are no embeddings, they are unfinished, or files do not belong together.
    """
    folder = Path(folder)
    sidecar = read_sidecar(sidecar_path(folder, "embed"))
    if sidecar is None and (folder / ".embed.plan.json").exists():
        raise ClipcidError(
            f"The embeddings in {folder} are unfinished.", "Give the same embed command again: it continues."
        )
    inside = folder / "img_emb"
    images = sorted((inside if inside.is_dir() else folder).glob("*.npy"), key=lambda path: natural_key(path.name))
    if not images:
        raise ClipcidError(
            f"{folder} holds no embeddings (img_emb/*.npy).", "Give --embeddings DIR, or make them: clipcid embed DATA"
        )
    metadata = _by_number(folder / "metadata", ".parquet")
    texts = _by_number(folder / "text_emb", ".npy")
    files, first, width = [], 0, _map_npy(images[0]).shape[1]
    for path in images:
        number = _number(path)
        file = EmbeddingFile(path, texts.get(number), metadata.get(number), first, len(_map_npy(path)))
        _check_file(file, width, bool(texts), bool(metadata))
        files.append(file)
        first += file.rows
    if first == 0:
        raise ClipcidError(f"{folder} holds {len(files)} files of embeddings without a row.", "Make them again.")
    return Embeddings(folder, tuple(files), width, sidecar, prefix_keys=keys == "shard")


def unit_rows(rows: npt.NDArray[Any]) -> Float16:
    """Normalise rows and round them once to float16; float16 rows that are unit already stay as they are.

    Args:
        rows: [n, D] of any floating-point format.

    Returns:
        float16 [n, D]; each row depends on its own values only. Zero rows and rows that are not finite come out as NaN.
    """
    exact = rows.astype(np.float64)
    norms = np.sqrt((exact * exact).sum(axis=1, keepdims=True))
    with np.errstate(invalid="ignore", divide="ignore"):
        scaled = np.where(np.isfinite(norms), exact / norms, np.nan).astype(np.float16)
    if rows.dtype == np.float16:
        scaled = np.where(np.abs(norms - 1) <= _UNIT_TOLERANCE, rows, scaled)
    return scaled


def holds_unit_rows(rows: npt.NDArray[Any]) -> bool:
    """Tell whether :func:`unit_rows` would leave all rows [n, D] as they are."""
    if rows.dtype != np.float16:
        return False
    for start in range(0, len(rows), _ROWS_IN_CACHE):
        exact = rows[start : start + _ROWS_IN_CACHE].astype(np.float64)
        norms = np.sqrt((exact * exact).sum(axis=1))
        if not np.all(np.abs(norms - 1) <= _UNIT_TOLERANCE):
            return False
    return True


def _check_file(file: EmbeddingFile, width: int, with_texts: bool, with_metadata: bool) -> None:
    mine = _map_npy(file.images).shape[1]
    if mine != width:
        raise ClipcidError(
            f"{file.images} has width {mine}, the files before it {width}.", "They are of different models."
        )
    for other, expected, what in (
        (file.texts, with_texts, "text embeddings"),
        (file.metadata, with_metadata, "metadata"),
    ):
        if other is None:
            if expected:
                raise ClipcidError(
                    f"{file.images} has no {what} of the same number beside it.", "Make the folder again."
                )
            continue
        rows = len(_map_npy(other)) if other.suffix == ".npy" else pq.read_metadata(other).num_rows
        if rows != file.rows:
            raise ClipcidError(
                f"{file.images} has {file.rows:,} rows and {other} has {rows:,}.",
                "Make the folder again; nothing was read.",
            )


def _map_npy(path: Path) -> npt.NDArray[Any]:
    array: npt.NDArray[Any]
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        # An array without rows cannot be mapped, only read.
        array = _load_empty(path, error)
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.floating):
        raise ClipcidError(
            f"{path} holds {array.dtype} {list(array.shape)}, not rows of floating-point numbers.",
            "Give other embeddings.",
        )
    return array


def _load_empty(path: Path, error: Exception) -> npt.NDArray[Any]:
    try:
        array: npt.NDArray[Any] = np.load(path, allow_pickle=False)
    except (OSError, ValueError):
        raise ClipcidError(f"{path} cannot be read: {error}.", "Make it again, or give other embeddings.") from error
    return array


def _by_number(folder: Path, suffix: str) -> dict[str, Path]:
    return {_number(path): path for path in folder.glob(f"*{suffix}")} if folder.is_dir() else {}


def _number(path: Path) -> str:
    """Return what tells the files of one shard from those of another: the number at the end of the name."""
    digits = re.search(r"(\d+)$", path.stem)
    return str(int(digits.group(1))) if digits else path.stem
