"""Optional embeddings of a shard: views of its images, and captions after the first.

- ``view_emb/view_emb_0000.npy``, float16 [n, V, D], unit rows: V augmented views of each image.
- ``view_params/view_params_0000.npy``, float32 [n, V, 16], the parameters that reproduce each: left, top, right, bottom
  of its crop in the image's pixels, then its colour map [3, 4] row by row. Where any view mixes two images, [n, V, 34]:
  these, the weight of the image, the other image's row counted from its own (NaN where that has none), and 16 of the other.
- ``variant_emb/variant_emb_0000.npy``, float16 [n, W, D], unit rows: W variants of each row's captions, whose text follows
  from captions, key and the seed in the sidecar.
- ``captions_emb/captions_emb_0000.npy``, float16 [Σ (count − 1), D], unit rows: captions after the first, row after row;
  column ``captions`` of the metadata has the number of captions of each row.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.embeddings.npy import NpyFile, find_npy
from clipcid_cli.formats.embeddings.pairing import list_files
from clipcid_cli.formats.embeddings.rows import map_file
from clipcid_cli.formats.parquet import column_names, read_columns

COUNTS_COLUMN = "captions"
_KINDS = ("view_emb", "view_params", "captions_emb", "variant_emb")  # in the order of `Extras`
_PARAMS = (16, 34)  # numbers of a view, without and with mixed ones
_AGAIN = "Make the folder again, by the command that made it and --overwrite."


@dataclasses.dataclass(frozen=True, slots=True)
class Extras:
    """The optional files of one shard.

    Attributes:
        views: Embeddings of views, [n, V, D]; None where there are none.
        view_params: Their parameters, [n, V, P]; None likewise.
        further: Embeddings of the captions after the first; None where no row has several.
        variants: Embeddings of variants of the captions, [n, W, D]; None where there are none.
    """

    views: NpyFile | None = None
    view_params: NpyFile | None = None
    further: NpyFile | None = None
    variants: NpyFile | None = None

    @property
    def num_views(self) -> int:
        """V, 0 where there are none."""
        return _second(self.views)

    @property
    def num_variants(self) -> int:
        """W, 0 where there are none."""
        return _second(self.variants)

    @property
    def shape(self) -> dict[str, int]:
        """What all shards of a folder have in common."""
        mixed = 0 if self.view_params is None else self.view_params.shape[-1]
        return {"views": self.num_views, "numbers of each view": mixed, "text variants": self.num_variants}

    def files(self) -> dict[str, NpyFile]:
        """Return the files that exist, by the names of the attributes."""
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: file for name, file in found.items() if file is not None}

    def check(self, rows: int, width: int) -> None:
        """Check shapes and formats against those of the image embeddings, [rows, width].

        Raises:
            ClipcidError: naming the file and both shapes.
        """
        if self.views is not None:
            views = (rows, self.num_views, width)
            _check(self.views, views, np.dtype(np.float16))
            if self.view_params is None:
                raise ClipcidError(f"{self.views.path} has no view_params of the same number.", _AGAIN)
            numbers = _PARAMS[1] if self.view_params.shape[-1:] == _PARAMS[1:] else _PARAMS[0]
            _check(self.view_params, (rows, self.num_views, numbers), np.dtype(np.float32))
        if self.further is not None:
            _check(self.further, (self.further.shape[0], width), np.dtype(np.float16))
        if self.variants is not None:
            _check(self.variants, (rows, self.num_variants, width), np.dtype(np.float16))

    def read_counts(self, metadata: Path | None, rows: int) -> npt.NDArray[np.int64]:
        """Read the number of embedded captions of each row, int64 [rows].

        Raises:
            ClipcidError: when they do not add up to the embeddings of further captions.
        """
        if self.further is None or metadata is None:
            return np.ones(rows, dtype=np.int64)
        counts = np.ones(rows, dtype=np.int64)
        if COUNTS_COLUMN in column_names(metadata, _AGAIN):
            counts = read_columns(metadata, {COUNTS_COLUMN: pa.int64()}, _AGAIN)[COUNTS_COLUMN].to_numpy()
        if len(counts) != rows or int(counts.min(initial=1)) < 1 or int(counts.sum()) - rows != self.further.shape[0]:
            raise ClipcidError(
                f"{self.further.path} has {self.further.shape[0]:,} rows; {metadata} counts {int(counts.sum()) - rows:,} "
                "captions after the first.",
                _AGAIN,
            )
        return counts


_NONE = Extras()


class ExtrasFinder:
    """Finds the optional files of each shard of a folder, whose subfolders are listed once."""

    def __init__(self, folder: Path) -> None:
        self._folders = [folder / kind for kind in _KINDS]
        self._names = [{path.name for path in list_files(inside, ".npy")} for inside in self._folders]

    def find(self, number: str) -> Extras:
        """Find those of a shard; `number` is the end of its files' names.

        Raises:
            ClipcidError: when a file cannot be read.
        """
        names = [f"{kind}_{number}.npy" for kind in _KINDS]
        parts = zip(self._folders, self._names, names, strict=True)
        if not any(self._names):
            return _NONE
        return Extras(*(find_npy(inside / name) if name in present else None for inside, present, name in parts))


class ViewParams:
    """The parameters of the views of N rows, mapped from several files; 16 or 34 numbers per view."""

    def __init__(self, files: list[NpyFile], num_views: int) -> None:
        self._files, self.num_views = files, num_views
        self._starts = np.concatenate([[0], np.cumsum([file.shape[0] for file in files], dtype=np.int64)])

    def read(self, row: int, view: int) -> npt.NDArray[np.float32]:
        """Return the parameters of one view, float32 [P], as an array of its own."""
        owner = int(np.searchsorted(self._starts, row, side="right")) - 1
        found: npt.NDArray[np.float32] = np.array(map_file(self._files[owner])[row - self._starts[owner], view])
        return found


def _second(file: NpyFile | None) -> int:
    return 0 if file is None or len(file.shape) < 2 else file.shape[1]


def _check(file: NpyFile, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    if file.shape != shape or file.dtype != dtype:
        raise ClipcidError(
            f"{file.path} holds {file.dtype} {list(file.shape)}; {dtype} {list(shape)} would match the image embeddings.",
            _AGAIN,
        )
