"""Rows and centroids in the format of a fast matrix product, with what bounds the error of its results.

The bound is that of :mod:`clipcid_cli.algorithms.near.block`. Each row has its own int8 step and residual, all
centroids have one step, so the integer products of a row order its centroids.

Shape letters: B rows of a block, K centroids, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from clipcid_cli.algorithms.near.block import (
    check_format,
    common_step,
    copies_error,
    is_lossless,
    narrow,
    residuals,
    row_steps,
    widen,
)
from clipcid_cli.algorithms.near.exact import ROWS_IN_CACHE

# A thousandth covers the rounding of the norms and of the formula of the bound, float32 sums of their own, many times over.
_ROUNDED_UP = 1.001

# Centroids up to this size are kept with their rotated copy while they are prepared.
_KEPT_BYTES = 2**26
# Copies of this many rows are made at once: on a CPU they stay near the caches.
_ROWS_AT_ONCE = {"cpu": ROWS_IN_CACHE, "cuda": 65_536}


@dataclasses.dataclass(frozen=True)
class PreparedRows:
    """A block of rows with all that can be known of them before the centroids: worth keeping from iteration to iteration.

    Attributes:
        rows_BD: Unit rows, float16 [B, D].
        cast_BD: Their copies in the format of the product; [B, 2] for int8 of width 1.
        steps_B: Value of the integer 1 in an int8 copy, float32 [B]; 1 for float formats.
        lengths_B: |x|, float32 [B].
        residuals_B: At least |x − x̂|, float32 [B].
    """

    rows_BD: torch.Tensor
    cast_BD: torch.Tensor
    steps_B: torch.Tensor
    lengths_B: torch.Tensor
    residuals_B: torch.Tensor

    def __len__(self) -> int:
        return len(self.rows_BD)

    @property
    def num_bytes(self) -> int:
        """Memory it takes."""
        return sum(getattr(self, field.name).nbytes for field in dataclasses.fields(self))

    def chosen(self, which: torch.Tensor | slice) -> PreparedRows:
        """Return some of the rows, by positions int64 [n] or a slice."""
        parts = (getattr(self, field.name) for field in dataclasses.fields(self))
        if isinstance(which, slice):
            return PreparedRows(*(part[which] for part in parts))
        # Copies whole rows, which indexing does entry by entry.
        return PreparedRows(*(part.index_select(0, which) for part in parts))


def prepare_rows(rows_BD: torch.Tensor, dtype: torch.dtype) -> PreparedRows:
    """Copy a block of rows in the format of the product and measure what that costs.

    Args:
        rows_BD: Unit rows, float16 [B, D].
        dtype: int8 (on a CPU), bfloat16, float16 or float32.

    Raises:
        ValueError: when the rows are not a float16 matrix, or the format is none of the four.
    """
    if rows_BD.ndim != 2 or rows_BD.dtype != torch.float16:
        raise ValueError(f"rows must be float16 [B, D], not {rows_BD.dtype} {list(rows_BD.shape)}")
    check_format(dtype, rows_BD.device)
    parts = [_prepare(part_BD, dtype) for part_BD in torch.split(rows_BD, _ROWS_AT_ONCE[rows_BD.device.type])]
    return PreparedRows(rows_BD, *(torch.cat(pieces) for pieces in zip(*parts, strict=True)))


def _prepare(rows_BD: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    exact_BD = rows_BD.float()
    lengths_B = exact_BD.norm(dim=1)
    steps_B1 = torch.ones_like(lengths_B)[:, None]
    if is_lossless(rows_BD.dtype, dtype):
        return exact_BD.to(dtype), steps_B1[:, 0], lengths_B, torch.zeros_like(lengths_B)
    wide_BD = widen(exact_BD, dtype)
    if dtype == torch.int8:
        steps_B1 = row_steps(wide_BD)
    cast_BD = narrow(wide_BD, dtype, steps_B1)
    return cast_BD, steps_B1[:, 0], lengths_B, residuals(wide_BD, cast_BD, lengths_B, steps_B1)


@dataclasses.dataclass(frozen=True)
class PreparedCentroids:
    """Centroids in the format of the product, the last one more than once to fill the last group.

    Attributes:
        cast_KD: Copies, [K rounded up, D]; [.., 2] for int8 of width 1.
        step: Value of the integer 1 in an int8 copy; 1 for float formats.
        longest: The largest |c|.
        residual: At least the largest |c − ĉ|.
    """

    cast_KD: torch.Tensor
    step: float
    longest: float
    residual: float

    def error(self, rows: PreparedRows) -> torch.Tensor:
        """Bound the error of the product of each row with any centroid, before it is rounded, float64 [B]."""
        lengths, errors = (rows.lengths_B, self.longest), (rows.residuals_B, self.residual)
        return copies_error(self.cast_KD.dtype, rows.rows_BD.shape[1], lengths, errors).double() * _ROUNDED_UP

    def float32_error(self, rows: PreparedRows) -> torch.Tensor:
        """Bound the error of float32 dot products of rows with any centroid, float64 [B]."""
        lengths, errors = (rows.lengths_B, self.longest), (torch.zeros_like(rows.lengths_B), 0.0)
        return copies_error(torch.float32, rows.rows_BD.shape[1], lengths, errors).double() * _ROUNDED_UP


def prepare_centroids(
    centroids_KD: torch.Tensor, dtype: torch.dtype, order_K: torch.Tensor | None, multiple: int
) -> PreparedCentroids:
    """Copy centroids in the format of the product and measure what that costs.

    Args:
        centroids_KD: float32 [K, D].
        dtype: As for :func:`prepare_rows`.
        order_K: Numbers of the centroids in the order of the copies, int64 [K]; None leaves them as they are.
        multiple: The number of copies is rounded up to a multiple of this.

    Raises:
        ValueError: when the format is none of the four.
    """
    check_format(dtype, centroids_KD.device)
    num_centroids, width = centroids_KD.shape

    # In parts: neither a reordered nor a rotated copy of all centroids need fit into memory. Where one does, it is kept: the
    # step is that of all, and rotating them twice would take a tenth of an iteration's time.
    def read() -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        at_once = _ROWS_AT_ONCE[centroids_KD.device.type]
        for first in range(0, num_centroids, at_once):
            place = slice(first, min(num_centroids, first + at_once))
            part_CD = centroids_KD[place if order_K is None else order_K[place]]
            yield place, part_CD, widen(part_CD, dtype)

    kept = list(read()) if dtype == torch.int8 and centroids_KD.nbytes <= _KEPT_BYTES else []
    step = common_step(wide_CD for _, _, wide_CD in kept or read()) if dtype == torch.int8 else 1.0
    cast_width = max(width, 2) if dtype == torch.int8 else width
    padded = -(-num_centroids // multiple) * multiple
    cast_KD = torch.empty(padded, cast_width, dtype=dtype, device=centroids_KD.device)
    largest = []
    for place, part_CD, wide_CD in kept or read():
        lengths_C = part_CD.norm(dim=1)
        cast_KD[place] = narrow(wide_CD, dtype, step)
        is_exact = is_lossless(part_CD.dtype, dtype)
        apart_C = torch.zeros_like(lengths_C) if is_exact else residuals(wide_CD, cast_KD[place], lengths_C, step)
        largest.append(torch.stack([lengths_C, apart_C]).amax(dim=1))
    cast_KD[num_centroids:] = cast_KD[num_centroids - 1]
    longest, residual = torch.stack(largest).amax(dim=0).tolist()
    return PreparedCentroids(cast_KD, step, longest, residual)
