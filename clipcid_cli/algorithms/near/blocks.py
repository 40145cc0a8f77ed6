"""Blocks of rows ready to be compared: as stored, and as a low-precision copy whose scores tell which pairs may be near.

The rows of a block share one int8 step, so that one integer bounds the scores of a whole tile. What scores may be off by is
proven in :mod:`clipcid_cli.algorithms.near.low_precision`; here it is turned into the smallest score of pairs that matter.

Shape letters: N rows, D width, M and N also rows of two blocks, P pairs.

Source: docs/method.md#fast-search-exact-result.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from clipcid_cli.algorithms.near import low_precision
from clipcid_cli.algorithms.near.distances import (
    LONGEST_ROW,
    ROWS_IN_CACHE,
    IntArray,
    ReadRows,
    squared_lengths,
)


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What holds for all rows of a block.

    Attributes:
        shortest: Length of the shortest row.
        longest: Length of the longest.
        residual: Largest length of a stored row minus its copy, rounded up.
        scale: Value of the integer 1 in an int8 copy; 1 for float formats.
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
    if low_precision.is_lossless(stored.dtype, scan_dtype):
        return Block(rows, stored, stored.to(scan_dtype), squared, Bounds(shortest, longest, 0.0))
    wide = list(_widened(stored, scan_dtype))
    scale = low_precision.common_step(wide) if scan_dtype == torch.int8 else 1.0
    copies = [low_precision.narrow(part, scan_dtype, scale) for part in wide]
    residuals = [
        low_precision.residuals(part, copy, longest, scale).max() for part, copy in zip(wide, copies, strict=True)
    ]
    bounds = Bounds(shortest, longest, float(torch.stack(residuals).max()), scale)
    return Block(rows, stored, torch.cat(copies), squared, bounds)


def reload_block(read: ReadRows, known: Block, scan_dtype: torch.dtype) -> Block:
    """Read rows again that :func:`load_block` prepared once; what it measured is taken from there.

    Args:
        known: The block, of which only row numbers, lengths and bounds are used.
        scan_dtype: Format of the fast product, the same as then.
    """
    stored = read_stored(read, known.rows, known.squared.device)
    if low_precision.is_lossless(stored.dtype, scan_dtype):
        return dataclasses.replace(known, stored=stored, scan=stored.to(scan_dtype))
    scan = torch.cat(
        [low_precision.narrow(part, scan_dtype, known.bounds.scale) for part in _widened(stored, scan_dtype)]
    )
    return dataclasses.replace(known, stored=stored, scan=scan)


def read_stored(read: ReadRows, rows: IntArray, device: torch.device) -> torch.Tensor:
    """Return rows as stored on a device, float16 [N, D]."""
    return torch.from_numpy(np.ascontiguousarray(read(rows))).to(device)


def _widened(stored_ND: torch.Tensor, scan_dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Yield what the copies are rounded from, float32, in parts that stay in the processor's cache."""
    return (low_precision.widen(part, scan_dtype) for part in torch.split(stored_ND, ROWS_IN_CACHE))


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

    A pair is within `cutoff` when float32(√d²) ≤ cutoff, so d < ε⁺, the next float32 above it, and with r the shortest rows
    a·b = (|a|² + |b|² − d²)/2 ≥ (r_a² + r_b² − ε⁺²)/2. Hence its score is at least that minus :func:`score_error`. The
    last rounding, to the output's format, is monotone: s ≥ t implies round(s) ≥ round(t), so comparing with t rounded down
    (see :func:`score_threshold`) loses nothing and needs no slack.

    Returns:
        The bound t, in units of a dot product; :func:`score_threshold` makes it comparable with computed scores.
    """
    beyond = float(np.nextafter(np.float32(cutoff), np.float32(np.inf)))
    needed = (a.bounds.shortest**2 + b.bounds.shortest**2 - beyond**2) / 2.0
    return needed - score_error(a, b)


def score_error(a: Block, b: Block) -> float:
    """Return the largest difference of a fast score from the exact dot product, before its last rounding."""
    one, other = a.bounds, b.bounds
    error = low_precision.score_error(
        a.scan.dtype, a.stored.shape[1], (one.longest, other.longest), (one.residual, other.residual)
    )
    # 2⁻¹⁴ for GPUs that flush float16's subnormals to zero; it also swallows the rounding of this very formula.
    return error + 2.0**-14


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
def exact_accumulation(device: torch.device, *, small_integers: bool = False) -> Iterator[None]:
    """Keep GPUs from adding up partial products in less than float32, and from rounding their factors to TF32.

    Every bound on a product's error relies on it, whatever the process was started with
    (``TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1`` is set in common containers).

    Args:
        small_integers: All factors are integers of at most 2,048 in float32, which TF32 holds exactly; it is allowed then.
    """
    if device.type != "cuda":
        yield
        return
    matmul = torch.backends.cuda.matmul
    names = (
        *("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction"),
        *("allow_fp16_accumulation", "allow_tf32"),
    )
    before = {name: getattr(matmul, name) for name in names}
    try:
        for name in names:
            setattr(matmul, name, small_integers and name == "allow_tf32")
        yield
    finally:
        for name, value in before.items():
            setattr(matmul, name, value)
