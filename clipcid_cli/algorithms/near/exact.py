"""Euclidean distances between stored embeddings, with the same bits on every machine.

Rows are float16 of length about 1. Each value is an integer multiple of 2⁻²⁴ (the spacing of float16's subnormals), so
each product of two values is a multiple of 2⁻⁴⁸, and the partial sums of a dot product of rows no longer than 2 stay below
4 by Cauchy-Schwarz. Multiples of 2⁻⁴⁸ below 2⁵ = 2⁵³·2⁻⁴⁸ are float64 numbers: no partial sum is ever rounded, so any order
of summation, tiling, instruction set or device gives the same d² = |a|² + |b|² − 2 a·b = Σ(aᵢ − bᵢ)². Its square root is
rounded to float64 and then to float32, once each, as IEEE 754 says. (float32 arithmetic has no such property: the same two
rows give other last bits in tiles of other shapes.)

Source: docs/method.md#distance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

# Row numbers and the like, in as few bytes as hold them, see `row_type`.
IntArray = npt.NDArray[np.signedinteger[Any]]
HalfArray = npt.NDArray[np.float16]
FloatArray = npt.NDArray[np.float32]
DoubleArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

# Reads stored rows, float16 [n, D], by their row numbers, integers [n].
ReadRows = Callable[[IntArray], HalfArray]

# A bound is changed by this share before it is rounded to float32: twice as much as rounding can change it.
ROUNDING_MARGIN = 2.0**-22

# Values of unit rows that are rounded are integers over this.
_GRID = 2.0**24

# Longest row for which the sums above are exact; and longest unit row or centroid once it is rounded, to float16 within 1e-3
# of 1. The square of the latter covers terms of second order in the rounding.
LONGEST_ROW = 2.0
LONGEST_UNIT_ROW = 1.01

# Gathering and multiplying one pair costs as much as this many entries of a float64 matrix product (measured on two cores:
# 0.8 million pairs a second against 91 million entries); it only chooses between two ways to the same bits. A search of
# 16,000 rows with many near copies took 3.3 s with both, 8.3 with pairs alone.
_ENTRIES_PER_PAIR = 50
# Gathered at once, they stay in a processor's cache: 2,048 at once took 1.4 times as long.
_PAIRS_AT_ONCE = {"cpu": 1024, "cuda": 65_536}

# Intermediate copies of this many rows stay in the processor's cache, which is five times as fast as fresh memory.
ROWS_IN_CACHE = 512


def row_type(num_rows: int) -> type[np.signedinteger[Any]]:
    """Return the type of the numbers of so many rows: int32 where that holds them and their number, else int64."""
    return np.int32 if num_rows < 2**31 else np.int64


def round_distances(squared_P: torch.Tensor) -> torch.Tensor:
    """Convert exact squared distances, float64, to edge weights: float32(√max(0, d²))."""
    return root(squared_P.clamp(min=0.0)).to(torch.float32)


def root(values: torch.Tensor) -> torch.Tensor:
    """Return square roots, float64 or float32, rounded as IEEE 754 requires.

    On CPUs, PyTorch's float64 roots differ from that for one value in 150, depending on its place in the array.
    """
    return torch.from_numpy(np.sqrt(values.numpy())) if values.device.type == "cpu" else values.sqrt()


def round_to_grid(rows_ND: torch.Tensor) -> torch.Tensor:
    """Round unit rows, float64, to multiples of 2⁻²⁴, which float32 holds within [−1, 1]: entries move by at most 2⁻²⁵."""
    return (rows_ND * _GRID).round().clamp(-_GRID, _GRID).div(_GRID).float()


def fold_sum(values_ND: torch.Tensor) -> torch.Tensor:
    """Sum each row, of width ≥ 1, by halving its width again and again: [N].

    Only element-wise additions in a fixed order take part, so the bits are the same on every device, which a library's
    own reduction does not promise.
    """
    while (width := values_ND.shape[1]) > 1:
        first_NH, second_NH, *last = torch.split(values_ND, width // 2, dim=1)
        values_ND = first_NH + second_NH
        if last:
            values_ND = torch.cat([values_ND, *last], dim=1)
    return values_ND[:, 0]


def squared_lengths(rows_ND: torch.Tensor) -> torch.Tensor:
    """Return |a|² of stored rows, float16 or float32, [N, D], as float64 [N], exact; not finite where a row is not."""
    # Squares of float16 numbers are exact in float32.
    kind = torch.float32 if rows_ND.dtype == torch.float16 else torch.float64
    wide = (rows.to(kind) for rows in torch.split(rows_ND, ROWS_IN_CACHE))
    return torch.cat([(rows * rows).sum(dim=1, dtype=torch.float64) for rows in wide])


def exact_dots(a_MD: torch.Tensor, b_ND: torch.Tensor, i_P: torch.Tensor, j_P: torch.Tensor) -> torch.Tensor:
    """Return the dot products, float64, of pairs of stored rows of two blocks, float16 or float32, by their positions."""
    rows, row_P = torch.unique(i_P, return_inverse=True)
    columns, column_P = torch.unique(j_P, return_inverse=True)
    if len(rows) * len(columns) <= _ENTRIES_PER_PAIR * len(i_P):
        return (a_MD[rows].double() @ b_ND[columns].double().T)[row_P, column_P]
    return dots_of_pairs(a_MD, b_ND, i_P, j_P)


def dots_of_pairs(a_MD: torch.Tensor, b_ND: torch.Tensor, i_P: torch.Tensor, j_P: torch.Tensor) -> torch.Tensor:
    """Return the same without looking for rows that occur several times, for which the host would wait for a GPU."""
    at_once = _PAIRS_AT_ONCE[i_P.device.type]
    if len(i_P) <= at_once:
        return paired_dots(a_MD.index_select(0, i_P), b_ND.index_select(0, j_P))
    pairs = zip(torch.split(i_P, at_once), torch.split(j_P, at_once), strict=True)
    return torch.cat([dots_of_pairs(a_MD, b_ND, i, j) for i, j in pairs])


def paired_dots(a_PD: torch.Tensor, b_PD: torch.Tensor) -> torch.Tensor:
    """Return the dot product of each row with the same row of the other, [P, D] both, float64 [P]."""
    if a_PD.device.type == "cpu":  # in a third of the time of PyTorch's operators, in half of that of NumPy's float16
        return torch.from_numpy(np.einsum("pd,pd->p", a_PD.float().numpy(), b_PD.float().numpy(), dtype=np.float64))
    return (a_PD.double() * b_PD.double()).sum(dim=1)


def edge_weights(squared_a: torch.Tensor, squared_b: torch.Tensor, dots: torch.Tensor) -> torch.Tensor:
    """Return distances, float32, from squared lengths and dot products, exact float64 of one shape or broadcast to it."""
    return round_distances(squared_a + squared_b - 2.0 * dots)


def distance_matrix(a_MD: torch.Tensor, b_ND: torch.Tensor) -> torch.Tensor:
    """Return the distance of each stored row of `a` to each of `b`, float32 [M, N]."""
    return edge_weights(squared_lengths(a_MD)[:, None], squared_lengths(b_ND), a_MD.double() @ b_ND.double().T)


def cosine_similarities(a_ND: HalfArray, b_ND: HalfArray) -> FloatArray:
    """Return the cosine of each row of `a` with the same row of `b`; NaN where one is zero or not finite.

    All sums are exact, so that the bits are the same on every machine.
    """
    a_ND, b_ND = a_ND.astype(np.float64), b_ND.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        dots_N = (a_ND * b_ND).sum(axis=1)
        lengths_N = np.sqrt((a_ND * a_ND).sum(axis=1)) * np.sqrt((b_ND * b_ND).sum(axis=1))
        return np.asarray(np.where(np.isfinite(lengths_N), dots_N / lengths_N, np.nan), np.float32)
