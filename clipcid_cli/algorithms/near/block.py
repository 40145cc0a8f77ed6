"""Rows ready to be compared: as stored, and copied in the format of a fast matrix product, with proven bounds.

A score is a dot product of copies in the format that the machine multiplies fastest: bfloat16 on CPUs with matrix units,
int8 on those with dot-product instructions, float16 on GPUs, float32 elsewhere. It only discards: pairs that the bound
proven here rules out. All others are decided exactly (:mod:`clipcid_cli.algorithms.near.exact`), so the format changes the
time, never the result.

Let â be the copy of a row a, ρ_a ≥ |a − â| its *residual*, which is measured, and R_a ≥ |a|. The computed score is
s = â·b̂ + δ before it is rounded to the format of the output, and by Cauchy–Schwarz

    a·b − â·b̂ = (a − â)·b + â·(b − b̂)    is at most    ρ_a·R_b + (R_a + ρ_a)·ρ_b,
    |δ| ≤ D·u·|â|·|b̂| ≤ D·u·(R_a + ρ_a)·(R_b + ρ_b)    for D accumulation steps of relative error u, in any order

(Higham, Accuracy and Stability of Numerical Algorithms, §3.1; rounded products count as a part of their step).

**int8.** The largest entry decides the step of all others, and embeddings of CLIP models have columns many times as large as
the rest. So rows are rotated first, by an orthogonal matrix T that spreads the length of a few columns over all: on features
of photographs of width 1,280 it cut the residual from 0.039 to 0.012. With D = a·b, a row with random signs is read as a
matrix [a, b] and multiplied by Hartley's orthogonal matrices of a and b: T = (H_a ⊗ H_b)·diag(±1) costs a + b
multiplications an entry instead of D, and a single column ends in entries of at most 2/√D. A step s then scales the row to
integers of at most 127; s has 8 significant bits, which makes s times an integer exact in float32.

Of the rotated rows Ta the same holds as above: â is integers times a step, and the residual |Ta − â| includes the error of
the computed rotation. With η = |TᵀT − I|, the distortion, |Ta| ≤ |a|·√(1 + η) and |a·b − Ta·Tb| = |aᵀ(TᵀT − I)b| ≤ η·|a||b|.
So the rotation adds at most 3η·|a|·|b|: one η for a·b against Ta·Tb, the others because |Ta| may exceed |a| by the factor
1 + η. Integers are added up in int32 without error up to a width of 133,000, so δ = 0; its term stays, and is larger than
that of η. Together

    |s − a·b| ≤ ρ_a·R_b + (R_a + ρ_a)·ρ_b + (D·u + 3η)·(R_a + ρ_a)·(R_b + ρ_b).

Unit rows of width 512 have errors of about 0.003 in bfloat16 and 0.02 in int8; copies of float16 rows in float16 and float32
have no residual.

Source: docs/method.md#fast-search-exact-result.
"""

from __future__ import annotations

import dataclasses
import math
from functools import lru_cache

import numpy as np
import torch

from clipcid_cli.algorithms.accumulation import exact_accumulation
from clipcid_cli.algorithms.near.exact import LONGEST_ROW, ROWS_IN_CACHE, IntArray, ReadRows, squared_lengths

# Largest relative error u of one step of a float32 accumulation, 2⁻²⁴ where it is rounded; matrix units may truncate and
# align a few products at a time, which four times that covers.
ACCUMULATION_UNIT = 2.0**-22
# Differences of a row and its copy and their lengths, computed in float32, have relative errors far below this.
_ROUNDED_UP = 1.0 + 1e-4
_LARGEST_INT8 = 127
# The rounding of a CPU's own float32 arithmetic.
_ROUNDING_UNIT = 2.0**-24


@dataclasses.dataclass(frozen=True)
class Block:
    """Rows on the device. They share one int8 step, so that one integer bounds the scores of two blocks."""

    rows: IntArray  # row numbers, integers [N]
    stored: torch.Tensor  # the rows as stored, float16 or float32, [N, D]
    scan: torch.Tensor  # their copies, [N, D]; [N, 2] with a column of zeros for int8 of width 1
    squared: torch.Tensor  # squared lengths, exact, float64 [N]; `shortest` and `longest` are lengths
    shortest: float
    longest: float
    residual: float  # bound of all residuals
    step: float  # value of the integer 1 in an int8 copy; 1 for float formats

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def num_bytes(self) -> int:
        return self.stored.nbytes + (0 if self.scan is self.stored else self.scan.nbytes)


def bytes_an_entry(scan_dtype: torch.dtype) -> int:
    """Return the bytes that an entry of a row takes: as stored in float16, and its copy unless that is the same."""
    return 2 if scan_dtype == torch.float16 else 2 + scan_dtype.itemsize


def load_block(read: ReadRows, rows: IntArray, device: torch.device, scan_dtype: torch.dtype) -> Block:
    """Read rows, by their numbers, and prepare them for comparison."""
    return make_block(rows, read_stored(read, rows, device), scan_dtype)


def read_stored(read: ReadRows, rows: IntArray, device: torch.device) -> torch.Tensor:
    """Return rows as stored on a device, float16 [N, D]."""
    return torch.from_numpy(np.ascontiguousarray(read(rows))).to(device)


def make_block(rows: IntArray, stored: torch.Tensor, scan_dtype: torch.dtype) -> Block:
    """Prepare rows for comparison, [N, D] with N ≥ 1; the copies are bfloat16, float16, float32 or, on a CPU, int8.

    Raises:
        ValueError: when a row is not finite or longer than ``LONGEST_ROW``, for which the distances would be inexact.
    """
    squared = squared_lengths(stored)
    shortest, longest = (math.sqrt(float(end)) for end in squared.aminmax())
    if not longest <= LONGEST_ROW:
        raise ValueError(f"rows must be finite and no longer than {LONGEST_ROW}, not {longest:.3g}")
    if scan_dtype in (stored.dtype, torch.float32):
        return Block(rows, stored, stored.to(scan_dtype), squared, shortest, longest, 0.0, 1.0)
    parts = torch.split(stored, ROWS_IN_CACHE)
    step = 1.0
    width = stored.shape[1]
    if scan_dtype == torch.int8:
        parts = tuple(map(rotate, parts))
        step = choose_step(max(float(part.abs().max()) for part in parts))
    copies = list[torch.Tensor]()
    apart = list[torch.Tensor]()
    for part in parts:
        copy = round_to_int8(part, step) if scan_dtype == torch.int8 else part.to(scan_dtype)
        copies.append(copy)
        # An integer of 8 bits times a step of 8 bits is exact in float32.
        apart.append(torch.linalg.vector_norm(part.float() - copy[:, :width].float() * step, dim=1).max())
    residual = float(torch.stack(apart).max()) * _ROUNDED_UP
    if scan_dtype == torch.int8:
        residual += rotation_error(width) * longest
    return Block(rows, stored, torch.cat(copies), squared, shortest, longest, residual, step)


def multiply(a_MD: torch.Tensor, b_ND: torch.Tensor, buffer: torch.Tensor | None = None) -> torch.Tensor:
    """Return the scores of two blocks' copies, [M, N], in the format of :func:`score_dtype`; in a buffer of M·N or more."""
    out = None if buffer is None else buffer[: len(a_MD) * len(b_ND)].view(len(a_MD), len(b_ND))
    with exact_accumulation(a_MD.device):
        if a_MD.dtype == torch.int8:
            return torch._int_mm(a_MD, b_ND.T) if out is None else torch._int_mm(a_MD, b_ND.T, out=out)
        return torch.mm(a_MD, b_ND.T, out=out)


def score_dtype(scan_dtype: torch.dtype) -> torch.dtype:
    """Return the number format of scores: for copies in int8 it is int32, in which they are exact."""
    return torch.int32 if scan_dtype == torch.int8 else scan_dtype


def lowest_score(a: Block, b: Block, cutoff: float) -> torch.Tensor:
    """Return a score that every pair of the two blocks within `cutoff` reaches, in the scores' format, without dimensions.

    A pair is within `cutoff` when float32(√d²) ≤ cutoff, so d < ε⁺, the next float32 above it, and with r the shortest rows
    a·b = (|a|² + |b|² − d²)/2 ≥ (r_a² + r_b² − ε⁺²)/2. Hence its score is at least that minus the error proven above. The
    last rounding, to the output's format, is monotone: s ≥ t implies round(s) ≥ round(t), so comparing with t rounded down
    loses nothing and needs no slack.
    """
    beyond = float(np.nextafter(np.float32(cutoff), np.float32(np.inf)))
    lowest = (a.shortest**2 + b.shortest**2 - beyond**2) / 2.0 - score_error(a, b)
    dtype = score_dtype(a.scan.dtype)
    if dtype == torch.int32:
        # One integer less for the rounding of this division.
        limit = math.floor(lowest / (a.step * b.step)) - 1
        kind = torch.iinfo(dtype)
        return torch.tensor(min(max(limit, kind.min), kind.max), dtype=dtype)
    rounded = torch.tensor(lowest, dtype=torch.float64).to(dtype)
    if float(rounded) > lowest:
        rounded = torch.nextafter(rounded, torch.tensor(-math.inf, dtype=dtype))
    return rounded


def rounded_error(a: Block, b: Block) -> float:
    """Bound the difference of a computed score, times both steps, from the exact dot product."""
    dtype = score_dtype(a.scan.dtype)
    # Beside the errors before it, the rounding of the output: half a unit in the last place, eps/2 of the score.
    rounding = 0.0 if dtype == torch.int32 else torch.finfo(dtype).eps
    return score_error(a, b) + rounding * (a.longest + a.residual) * (b.longest + b.residual)


def score_error(a: Block, b: Block) -> float:
    """Bound the difference of a score from the exact dot product, before its last rounding."""
    width = a.stored.shape[1]
    relative = width * ACCUMULATION_UNIT
    if a.scan.dtype == torch.int8:
        relative += 3.0 * distortion(width)
    copy_a, copy_b = a.longest + a.residual, b.longest + b.residual
    error = a.residual * b.longest + copy_a * (b.residual + relative * copy_b)
    # 2⁻¹⁴ for GPUs that flush float16's subnormals to zero; it also swallows the rounding of this very formula.
    return error + 2.0**-14


def rotate(rows_ND: torch.Tensor) -> torch.Tensor:
    """Return the rotated rows T·a, float32 [N, D], each off by at most :func:`rotation_error` times its length."""
    signs_D, left_aa, right_bb, _ = _rotation(rows_ND.shape[1])
    blocks = (rows_ND * signs_D).view(-1, len(right_bb)) @ right_bb.T
    return (left_aa @ blocks.view(-1, len(left_aa), len(right_bb))).view(rows_ND.shape)


def rotation_error(width: int) -> float:
    """Bound how far a computed rotated row of length 1 is from the exact one.

    A product with H_b makes an entry off by at most b·2⁻²⁴·|(H_b)_i| times the length of its part of the row (Higham §3.1),
    all b of them by √b times that; so does the one with H_a, which hands the first error on as it is.
    """
    return 1.001 * sum(math.sqrt(size) * (size + 1) for size in _factors(width)) * _ROUNDING_UNIT


def distortion(width: int) -> float:
    """Return |TᵀT − I| in the spectral norm, at most."""
    return _rotation(width)[-1]


def round_to_int8(rotated_ND: torch.Tensor, step: float) -> torch.Tensor:
    """Return the integers q nearest to a rotated row over the step, int8 [N, D]; [N, 2] with a column of zeros for D = 1."""
    rounded_ND = (rotated_ND / step).round_().to(torch.int8)
    # PyTorch 2.13 returns what was in memory for products of one column.
    return rounded_ND if rounded_ND.shape[1] > 1 else torch.nn.functional.pad(rounded_ND, (0, 1))


def choose_step(largest: float) -> float:
    """Return the smallest number of 8 significant bits that scales the largest entry to 127 at most; 1 for 0."""
    fraction, exponent = math.frexp(largest / _LARGEST_INT8)
    return math.ldexp(math.ceil(fraction * 2**8), exponent - 8) if largest else 1.0


@lru_cache(maxsize=4)
def _rotation(width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """Return the signs, float32 [D], H_a and H_b, float32, and how far T is from an orthogonal matrix, at most.

    With HᵀH = I + E, TᵀT differs from I by a term of norm at most |E_a| + |E_b| + |E_a||E_b|. Another matrix would change
    which pairs are decided exactly, never the result.
    """
    signs = np.random.default_rng(0).integers(0, 2, size=width) * 2.0 - 1.0
    matrices = list[torch.Tensor]()
    apart = 1.0
    for size in _factors(width):
        angles = 2.0 * np.pi / size * (np.outer(np.arange(size), np.arange(size)) % size)
        matrix = ((np.cos(angles) + np.sin(angles)) / math.sqrt(size)).astype(np.float32)
        matrices.append(torch.from_numpy(matrix))
        wide = matrix.astype(np.float64)
        # The float64 product is itself off by less than 1e-12 at any width that embeddings have.
        apart *= 1.0 + float(np.linalg.norm(wide.T @ wide - np.eye(size))) + 1e-9
    left_aa, right_bb = matrices
    return torch.from_numpy(signs).float(), left_aa, right_bb, apart - 1.0


def _factors(width: int) -> tuple[int, int]:
    """Return a ≤ b with a·b = D, as near each other as can be."""
    left = math.isqrt(width)
    while width % left:
        left -= 1
    return left, width // left
