"""Rows and centroids in the format of a fast matrix product, and how far its results can be off.

Shape letters: B rows of a block, K centroids, D width.

Write x, c for a row and a centroid, x̂, ĉ for their copies in the format of the product, and a = fl(x̂·ĉ) for the product
accumulated in float32 or, of integers, in int32. Then

    |a − x·c| ≤ |x − x̂|·|c| + |x̂|·|c − ĉ| + γ·|x̂|·|ĉ| =: e      (Cauchy–Schwarz; γ = D·2⁻²², four times the textbook
                                                                D·2⁻²⁴, which also covers truncating accumulators)

The residuals |x − x̂|, |c − ĉ| are measured, not bounded. For int8 the same is said of the rotated row Tx and the rotated
centroid Tc (:mod:`clipcid_cli.algorithms.search.int8`), x̂ = r·q with a step r for each row, ĉ = s·p with one step s for all
centroids, so that the integers q·p of a row order its centroids; the rotation adds the error of its own product to the
residuals and at most 3η·|x|·|c| to e for its distortion η (one for x·c against Tx·Tc, the others for |Tx| and |Tc|,
which e names |x| and |c|). Integers are added up without error; their γ stays, and is larger than that.

In float32 and float16 nothing is lost but γ; bfloat16 costs e ≈ 0.003, int8 e ≈ 0.02 at a width of 512.

A float32 product may also be one of leading coordinates (:mod:`clipcid_cli.algorithms.kmeans.leading_coordinates`).
That one can be far too large, and too small by e at most: x·c ≤ a + e, which is all that finding the nearest needs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from clipcid_cli.algorithms.kmeans.leading_coordinates import LeadingCoordinates
from clipcid_cli.algorithms.search.distances import ROWS_IN_CACHE
from clipcid_cli.algorithms.search.int8 import choose_steps, distortion, rotate, rotation_error, round_to_int8

# A thousandth covers the rounding of the norms and of the formula for e, float32 sums of their own, many times over.
_ROUNDED_UP = 1.001
_DTYPES = (torch.int8, torch.bfloat16, torch.float16, torch.float32)


@dataclasses.dataclass(frozen=True)
class PreparedRows:
    """A block of rows with all that can be known of them before the centroids: worth keeping from iteration to iteration.

    Attributes:
        rows_BD: Unit rows, float16 [B, D].
        cast_BD: The same in the format of the product, x̂/r; [B, 2] for int8 of width 1, [B, d + 1] for leading coordinates.
        steps_B: What 1 stands for in that copy, r, float32 [B]; 1 for float formats.
        lengths_B: An upper bound of |x| and of |x̂|, float32 [B].
        residuals_B: |x − x̂|, at most, float32 [B]; 0 for leading coordinates.
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
        return PreparedRows(*(getattr(self, field.name)[which] for field in dataclasses.fields(self)))


def prepare_rows(
    rows_BD: torch.Tensor, dtype: torch.dtype, coordinates: LeadingCoordinates | None = None
) -> PreparedRows:
    """Copy a block of rows in the format of the product and measure what that costs.

    Args:
        rows_BD: Unit rows, float16 [B, D].
        dtype: int8 (on a CPU), bfloat16, float16 or float32.
        coordinates: Which to multiply alone, in float32; all without.

    Raises:
        ValueError: when the rows are not a float16 matrix, or the format is none of the four.
    """
    if rows_BD.ndim != 2 or rows_BD.dtype != torch.float16:
        raise ValueError(f"rows must be float16 [B, D], not {rows_BD.dtype} {list(rows_BD.shape)}")
    check_format(dtype, rows_BD.device, coordinates)
    parts = [_prepare(part_BD, dtype, coordinates) for part_BD in torch.split(rows_BD, ROWS_IN_CACHE)]
    return PreparedRows(rows_BD, *(torch.cat(pieces) for pieces in zip(*parts, strict=True)))


def _prepare(
    rows_BD: torch.Tensor, dtype: torch.dtype, coordinates: LeadingCoordinates | None
) -> tuple[torch.Tensor, ...]:
    exact_BD = rows_BD.float()
    lengths_B = exact_BD.norm(dim=1)
    steps_B, nothing_B = torch.ones_like(lengths_B), torch.zeros_like(lengths_B)
    if coordinates is not None:
        encoded_BW = coordinates.encode(rows_BD)
        return encoded_BW, steps_B, torch.maximum(lengths_B, encoded_BW.norm(dim=1)), nothing_B
    if dtype == torch.float32:
        return exact_BD, steps_B, lengths_B, nothing_B
    if dtype == torch.int8:
        rotated_BD = rotate(rows_BD)
        steps_B = choose_steps(rotated_BD.abs().amax(dim=1))
        cast_BD = round_to_int8(rotated_BD, steps_B[:, None])
        residuals_B = _differences(rotated_BD, cast_BD, steps_B[:, None]) + rotation_error(rows_BD.shape[1]) * lengths_B
    else:
        cast_BD = rows_BD.to(dtype)
        residuals_B = _differences(exact_BD, cast_BD, 1.0)
    return cast_BD, steps_B, lengths_B + residuals_B, residuals_B


def _differences(wide_BD: torch.Tensor, cast_BD: torch.Tensor, steps: torch.Tensor | float) -> torch.Tensor:
    apart_BD: torch.Tensor = wide_BD - cast_BD[:, : wide_BD.shape[1]].float() * steps
    lengths_B: torch.Tensor = torch.linalg.vector_norm(apart_BD, dim=1)
    return lengths_B


@dataclasses.dataclass(frozen=True)
class PreparedCentroids:
    """Centroids in the format of the product, some zero rows after them to fill the last group.

    Attributes:
        cast_KD: ĉ/s, [K rounded up, D]; [.., 2] for int8 of width 1, [.., d + 1] for leading coordinates.
        step: What 1 stands for in that copy, s; 1 for float formats.
        longest: An upper bound of |c| and of |ĉ|.
        residual: The largest |c − ĉ|, at most; 0 for leading coordinates.
        relative_error: What else the product can be off by, as a share of the lengths of row and centroid.
    """

    cast_KD: torch.Tensor
    step: float
    longest: float
    residual: float
    relative_error: float

    def error(self, rows: PreparedRows) -> torch.Tensor:
        """Bound the error e of the product of each row with any centroid, float64 [B]."""
        relative = self.relative_error * self.longest
        error_B = rows.residuals_B * self.longest + rows.lengths_B * (self.residual + relative)
        return error_B.double() * _ROUNDED_UP

    def float32_error(self, rows: PreparedRows) -> torch.Tensor:
        """Bound the error of float32 dot products of rows with any centroid, float64 [B]: e of copies that lose nothing."""
        relative = rows.rows_BD.shape[1] * 2.0**-22
        return (rows.lengths_B * (relative * self.longest)).double() * _ROUNDED_UP


def prepare_centroids(
    centroids_KD: torch.Tensor,
    dtype: torch.dtype,
    order_K: torch.Tensor | None,
    multiple: int,
    coordinates: LeadingCoordinates | None = None,
) -> PreparedCentroids:
    """Copy centroids in the format of the product and measure what that costs.

    Args:
        centroids_KD: float32 [K, D].
        dtype: As for :func:`prepare_rows`.
        order_K: Numbers of the centroids in the order in which they are wanted, int64 [K]; None leaves them as they are.
        multiple: The copy has a multiple of so many rows.
        coordinates: As for :func:`prepare_rows`.

    Raises:
        ValueError: when the format is none of the four.
    """
    check_format(dtype, centroids_KD.device, coordinates)
    num_centroids, width = centroids_KD.shape
    padded = -(-num_centroids // multiple) * multiple
    is_int8 = dtype == torch.int8

    def parts() -> Iterator[tuple[slice, torch.Tensor]]:
        for first in range(0, num_centroids, ROWS_IN_CACHE):
            place = slice(first, min(num_centroids, first + ROWS_IN_CACHE))
            yield place, centroids_KD[place if order_K is None else order_K[place]]

    step, relative_error = 1.0, width * 2.0**-22
    if coordinates is not None:
        relative_error = coordinates.relative_error
    if is_int8:
        relative_error += 3.0 * distortion(width)
        step = float(choose_steps(torch.stack([rotate(part_CD).abs().max() for _, part_CD in parts()]).max()))
    cast_width = max(width, 2) if is_int8 else width if coordinates is None else coordinates.width
    cast_KD = torch.zeros(padded, cast_width, dtype=dtype, device=centroids_KD.device)
    longest, residual = 0.0, 0.0
    for place, part_CD in parts():
        longest = max(longest, float(part_CD.norm(dim=1).max()))
        if coordinates is not None:
            cast_KD[place] = coordinates.encode(part_CD)
            longest = max(longest, float(cast_KD[place].norm(dim=1).max()))
            continue
        wide_CD = rotate(part_CD) if is_int8 else part_CD
        cast_KD[place] = round_to_int8(wide_CD, step) if is_int8 else wide_CD
        residual = max(residual, float(_differences(wide_CD, cast_KD[place], step).max()))
    if is_int8:
        residual += rotation_error(width) * longest
    return PreparedCentroids(cast_KD, step, longest + residual, residual, relative_error)


def check_format(dtype: torch.dtype, device: torch.device, coordinates: LeadingCoordinates | None = None) -> None:
    """Refuse what products cannot be computed in.

    Raises:
        ValueError: as it says.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"the product can be in {', '.join(map(str, _DTYPES))}, not {dtype}")
    if dtype == torch.int8 and device.type != "cpu":
        raise ValueError(f"products in torch.int8 are for CPUs, not {device}")
    if coordinates is not None and dtype != torch.float32:
        raise ValueError(f"leading coordinates are multiplied in torch.float32, not {dtype}")
