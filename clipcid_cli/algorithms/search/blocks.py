"""Rows in the format of a fast matrix product, and how far its scores can be off.

A score is the dot product of two rows in a format that the machine multiplies fastest, to tell at once that most pairs are
too far apart to matter. What it may be off by is proven here, so that what is discarded is never missed.

Copies in int8 are rotated first, see :mod:`clipcid_cli.algorithms.search.int8`; the rows of a block share one step, so that
one integer bounds the scores of a whole tile.

Shape letters: N rows, D width, M and N also rows of two blocks, P pairs.

Source: docs/method.md#fast-search-exact-result.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from clipcid_cli.algorithms.search.distances import (
    LONGEST_ROW,
    ROWS_IN_CACHE,
    IntArray,
    ReadRows,
    squared_lengths,
)
from clipcid_cli.algorithms.search.int8 import choose_steps, distortion, rotate, rotation_error, round_to_int8

# Largest relative error of one fused step of a float32 accumulation, 2⁻²⁴ where it is rounded; matrix units may truncate
# and align a few products at a time, which four times that covers.
_ACCUMULATION_UNIT = 2.0**-22


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What holds for all rows of a block.

    Attributes:
        residual: Largest length of a stored row minus its copy in the format of the fast product, rounded up.
        scale: What an integer of that copy stands for; 1 for float formats.
    """

    shortest: float
    longest: float
    residual: float
    scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class Block:
    """Rows on the device, ready to be compared.

    Attributes:
        rows: Row numbers, int64 [N].
        stored: The rows as stored, float16 [N, D].
        scan: The same in the format of the fast product, [N, D]; [N, 2] with a column of zeros for int8 of width 1.
        squared: Squared lengths, exact, float64 [N].
        bounds: What holds for all of them.
    """

    rows: IntArray
    stored: torch.Tensor
    scan: torch.Tensor
    squared: torch.Tensor
    bounds: Bounds

    def part(self, start: int, stop: int) -> Block:
        """Return some of the rows; the bounds of the whole block hold for them."""
        return dataclasses.replace(
            self,
            rows=self.rows[start:stop],
            stored=self.stored[start:stop],
            scan=self.scan[start:stop],
            squared=self.squared[start:stop],
        )

    def chosen(self, which: torch.Tensor) -> Block:
        """Return the rows at positions int64 [M], as float32 copies, which lose nothing."""
        stored = self.stored[which]
        bounds = dataclasses.replace(self.bounds, residual=0.0, scale=1.0)
        return Block(self.rows[which.cpu().numpy()], stored, stored.float(), self.squared[which], bounds)

    def __len__(self) -> int:
        return len(self.rows)


def load_block(read: ReadRows, rows: IntArray, device: torch.device, scan_dtype: torch.dtype) -> Block:
    """Read rows and prepare them for comparison.

    Args:
        rows: Row numbers, int64 [N], N ≥ 1.
        scan_dtype: Format of the fast product: bfloat16, float16, float32, or int8 on a CPU.

    Raises:
        ValueError: when a row is not finite or longer than ``LONGEST_ROW``, for which the distances would be inexact.
    """
    stored = read_stored(read, rows, device)
    squared = squared_lengths(stored)
    low, high = squared.aminmax()
    if not float(high) <= LONGEST_ROW**2:
        raise ValueError(f"rows must be finite and no longer than {LONGEST_ROW}, not {math.sqrt(float(high)):.3g}")
    shortest, longest = math.sqrt(float(low)), math.sqrt(float(high))
    if scan_dtype == torch.int8:
        rotated = _rotated(stored)
        scale = float(choose_steps(torch.stack([part.abs().max() for part in rotated]).max()))
        scan = _round_parts(rotated, scale)
        residual = _largest_difference(rotated, scan, scale) + rotation_error(stored.shape[1]) * longest
        return Block(rows, stored, scan, squared, Bounds(shortest, longest, residual, scale))
    scan = stored.to(scan_dtype)
    exact = scan_dtype != torch.bfloat16
    residual = 0.0 if exact else _largest_difference([part.float() for part in _parts(stored)], scan, 1.0)
    return Block(rows, stored, scan, squared, Bounds(shortest, longest, residual))


def reload_block(read: ReadRows, known: Block, scan_dtype: torch.dtype) -> Block:
    """Read rows again that :func:`load_block` prepared once; what it measured is taken from there.

    Args:
        known: The block, of which only row numbers, lengths and bounds are used.
        scan_dtype: Format of the fast product, the same as then.
    """
    stored = read_stored(read, known.rows, known.squared.device)
    is_int8 = scan_dtype == torch.int8
    scan = _round_parts(_rotated(stored), known.bounds.scale) if is_int8 else stored.to(scan_dtype)
    return dataclasses.replace(known, stored=stored, scan=scan)


def read_stored(read: ReadRows, rows: IntArray, device: torch.device) -> torch.Tensor:
    """Return rows as stored on a device, float16 [N, D]."""
    return torch.from_numpy(np.ascontiguousarray(read(rows))).to(device)


def _parts(rows_ND: torch.Tensor) -> Sequence[torch.Tensor]:
    return torch.split(rows_ND, ROWS_IN_CACHE)


def _rotated(stored_ND: torch.Tensor) -> list[torch.Tensor]:
    """Return the rotated rows T·a, float32, in parts."""
    return [rotate(part) for part in _parts(stored_ND)]


def _round_parts(rotated: Sequence[torch.Tensor], scale: float) -> torch.Tensor:
    return torch.cat([round_to_int8(part, scale) for part in rotated])


def _largest_difference(wide: Sequence[torch.Tensor], scan_ND: torch.Tensor, scale: float) -> float:
    """Return the largest |a − s·â| of rows in float32, in parts, and their copies; rounded up."""
    # s·â is exact in float32; the differences and their length have relative errors far below the 1e-4 added.
    copies = _parts(scan_ND[:, : wide[0].shape[1]])
    norms = [(a - b.float() * scale).norm(dim=1).max() for a, b in zip(wide, copies, strict=True)]
    return float(torch.stack(norms).max()) * (1 + 1e-4)


def multiply(a_MD: torch.Tensor, b_ND: torch.Tensor, buffer: torch.Tensor | None = None) -> torch.Tensor:
    """Return the scores of two blocks' `scan`, [M, N], in the format of :func:`score_dtype`.

    Args:
        b_ND: Likewise, of the same format.
        buffer: Where to put them, at least M·N entries of the scores' format.
    """
    shape = (len(a_MD), len(b_ND))
    out = None if buffer is None else buffer[: shape[0] * shape[1]].view(shape)
    if a_MD.dtype == torch.int8:
        return torch._int_mm(a_MD, b_ND.T) if out is None else torch._int_mm(a_MD, b_ND.T, out=out)
    return torch.mm(a_MD, b_ND.T, out=out)


def score_dtype(scan_dtype: torch.dtype) -> torch.dtype:
    """Return the format of the scores: that of the rows, and int32 for int8, in which they are exact."""
    return torch.int32 if scan_dtype == torch.int8 else scan_dtype


def lowest_score(a: Block, b: Block, cutoff: float) -> float:
    """Return a score below which no pair of the two blocks is within `cutoff`.

    Let â, b̂ be the rows in the format of the fast product, ρ ≥ |a − â| the blocks' residuals and R ≥ |a| their longest
    rows. The computed score is s = â·b̂ + δ before it is rounded to the format of the output, and by Cauchy-Schwarz

        a·b − â·b̂ = (a − â)·b + â·(b − b̂)    is at most    ρ_a·R_b + (R_a + ρ_a)·ρ_b,
        |δ| ≤ D·u·|â||b̂| ≤ D·u·(R_a + ρ_a)(R_b + ρ_b)    for D accumulation steps of relative error u, in any order

    (Higham, Accuracy and Stability of Numerical Algorithms, §3.1; products of two bfloat16 or float16 numbers are exact in
    float32, products of float32 copies of float16 numbers too). A pair is within `cutoff` when float32(√d²) ≤ cutoff, so
    d < ε⁺, the next float32 above it, and a·b = (|a|² + |b|² − d²)/2 ≥ (r_a² + r_b² − ε⁺²)/2 with r the shortest rows.
    Hence s is at least that minus both errors. The last rounding, to the output's format, is monotone: s ≥ t implies
    round(s) ≥ round(t), so comparing with t rounded down (see :func:`score_threshold`) loses nothing and needs no slack.

    For int8 the same is said of the rotated rows Ta, whose residual is |Ta − s·q|, with the distortion η of the
    rotation added. Integers are added up without error, so δ = 0; the term for it stays, and is larger than all that η adds.

    Returns:
        The bound t, in units of a dot product; :func:`score_threshold` makes it comparable with computed scores.
    """
    beyond = float(np.nextafter(np.float32(cutoff), np.float32(np.inf)))
    needed = (a.bounds.shortest**2 + b.bounds.shortest**2 - beyond**2) / 2.0
    return needed - score_error(a, b)


def score_error(a: Block, b: Block) -> float:
    """Return the largest difference of a fast score from the exact dot product, before its last rounding."""
    width, one, other = a.stored.shape[1], a.bounds, b.bounds
    conversion = one.residual * other.longest + (one.longest + one.residual) * other.residual
    lengths = (one.longest + one.residual) * (other.longest + other.residual)
    accumulation = width * _ACCUMULATION_UNIT * lengths
    if a.scan.dtype == torch.int8:
        # Also |Ta| where `conversion` has |a|: √(1 + η) ≤ 1 + η on a term below `lengths`.
        conversion += 3.0 * distortion(width) * lengths
    # 2⁻¹⁴ for GPUs that flush float16's subnormals to zero; it also swallows the rounding of this very formula.
    return conversion + accumulation + 2.0**-14


def score_threshold(a: Block, b: Block, lowest: float) -> torch.Tensor:
    """Return the smallest computed score that :func:`lowest_score` lets pass, in the scores' format, without dimensions."""
    dtype = score_dtype(a.scan.dtype)
    if dtype == torch.int32:
        # One integer less for the rounding of this division.
        limit = math.floor(lowest / (a.bounds.scale * b.bounds.scale)) - 1
        kind = torch.iinfo(dtype)
        return torch.tensor(min(max(limit, kind.min + 1), kind.max), dtype=dtype)
    rounded = torch.tensor(lowest, dtype=torch.float64).to(dtype)
    if float(rounded) > lowest:
        rounded = torch.nextafter(rounded, torch.tensor(-math.inf, dtype=dtype))
    return rounded


def score_bounds(a: Block, b: Block, score_P: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bound the dot products behind computed scores [P] from below and above, float64 [P] each."""
    wide_P = score_P.to(torch.float64) * (a.bounds.scale * b.bounds.scale)
    # Beside the errors before it, the rounding of the output: half a unit in the last place, eps/2 of the score.
    rounding = 0.0 if score_P.dtype == torch.int32 else torch.finfo(score_P.dtype).eps
    error_P = wide_P.abs() * rounding + score_error(a, b)
    return wide_P - error_P, wide_P + error_P


@contextmanager
def exact_accumulation(device: torch.device) -> Iterator[None]:
    """Keep GPUs from adding up partial products in less than float32, as :func:`score_error` requires."""
    if device.type != "cuda":
        yield
        return
    matmul = torch.backends.cuda.matmul
    names = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction", "allow_tf32")
    before = {name: getattr(matmul, name) for name in names}
    try:
        for name in names:
            setattr(matmul, name, False)
        yield
    finally:
        for name, value in before.items():
            setattr(matmul, name, value)
