"""Copies of rows in the format of a fast matrix product, and how far products of copies are from the exact ones.

A score is a dot product in the format that the machine multiplies fastest. It only discards: pairs that the bound proven
here rules out. All others are decided exactly, so the format changes the time, never the result.

Let â be the copy of a row a, ρ_a ≥ |a − â| its *residual*, which is measured, and R_a ≥ |a|. The computed score is
s = â·b̂ + δ before it is rounded to the format of the output, and by Cauchy–Schwarz

    a·b − â·b̂ = (a − â)·b + â·(b − b̂)    is at most    ρ_a·R_b + (R_a + ρ_a)·ρ_b,
    |δ| ≤ D·u·|â|·|b̂| ≤ D·u·(R_a + ρ_a)·(R_b + ρ_b)    for D accumulation steps of relative error u, in any order

(Higham, Accuracy and Stability of Numerical Algorithms, §3.1; rounded products count as a part of their step).

For int8 the same holds of the rotated rows Ta (:mod:`clipcid_cli.algorithms.near.int8`): â is integers times a step, the
residual |Ta − â| includes the error of the computed rotation, and the rotation's distortion η adds at most 3η·|a|·|b|: one η
for a·b against Ta·Tb, the others because |Ta| may exceed |a| by the factor 1 + η. Integers are added up without error, so
δ = 0; its term stays, and is larger than that of η. Together

    |s − a·b| ≤ ρ_a·R_b + (R_a + ρ_a)·ρ_b + (D·u + 3η)·(R_a + ρ_a)·(R_b + ρ_b).

Unit rows of width 512 have errors of about 0.003 in bfloat16 and 0.02 in int8; copies of float16 rows in float16 and float32
have no residual.

Shape letters: N rows, D width.

Source: docs/method.md#fast-search-exact-result.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import torch

from clipcid_cli.algorithms.near.int8 import choose_steps, distortion, rotate, rotation_error, round_to_int8

Bound = TypeVar("Bound", float, torch.Tensor)

FORMATS = (torch.int8, torch.bfloat16, torch.float16, torch.float32)

# Largest relative error u of one step of a float32 accumulation, 2⁻²⁴ where it is rounded; matrix units may truncate and
# align a few products at a time, which four times that covers.
ACCUMULATION_UNIT = 2.0**-22
# Differences of a row and its copy and their lengths, computed in float32, have relative errors far below this.
_ROUNDED_UP = 1.0 + 1e-4


def check_format(dtype: torch.dtype, device: torch.device) -> None:
    """Refuse formats in which products cannot be computed.

    Raises:
        ValueError: for a format not in ``FORMATS``, and for int8 on another device than a CPU.
    """
    if dtype not in FORMATS:
        raise ValueError(f"the product can be in {', '.join(map(str, FORMATS))}, not {dtype}")
    if dtype == torch.int8 and device.type != "cpu":
        raise ValueError(f"products in torch.int8 are for CPUs, not {device}")


def is_lossless(source: torch.dtype, target: torch.dtype) -> bool:
    """Tell whether copies of float16 or float32 rows have no residual."""
    return target in (source, torch.float32)


def widen(rows_ND: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return what copies are rounded from, float32 [N, D]: for int8 the rotated rows, otherwise the rows."""
    return rotate(rows_ND) if dtype == torch.int8 else rows_ND.float()


def narrow(wide_ND: torch.Tensor, dtype: torch.dtype, steps: torch.Tensor | float = 1.0) -> torch.Tensor:
    """Round :func:`widen`-ed rows to a format: [N, D]; [N, 2] with a column of zeros for int8 of width 1.

    Args:
        steps: For int8, the value of the integer 1: one for all rows, or float32 [N, 1].
    """
    return round_to_int8(wide_ND, steps) if dtype == torch.int8 else wide_ND.to(dtype)


def row_steps(wide_ND: torch.Tensor) -> torch.Tensor:
    """Choose an int8 step for each row, float32 [N, 1]."""
    return choose_steps(wide_ND.abs().amax(dim=1, keepdim=True))


def common_step(wide_parts: Iterable[torch.Tensor]) -> float:
    """Choose one int8 step for all rows of some parts, so that integer scores compare across rows."""
    return float(choose_steps(torch.stack([wide_ND.abs().max() for wide_ND in wide_parts]).max()))


def residuals(
    wide_ND: torch.Tensor, copy_ND: torch.Tensor, lengths: Bound, steps: torch.Tensor | float = 1.0
) -> torch.Tensor:
    """Bound the residuals of copies, float32 [N].

    Args:
        lengths: |a| of each row [N], or of the longest.
        steps: As for :func:`narrow`.
    """
    width = wide_ND.shape[1]
    # An integer of 8 bits times a step of 8 bits is exact in float32.
    apart_ND = wide_ND - copy_ND[:, :width].float() * steps
    apart_N: torch.Tensor = torch.linalg.vector_norm(apart_ND, dim=1) * _ROUNDED_UP
    return apart_N + rotation_error(width) * lengths if copy_ND.dtype == torch.int8 else apart_N


def score_error(dtype: torch.dtype, width: int, lengths: tuple[Bound, float], residuals: tuple[Bound, float]) -> Bound:
    """Bound the difference of a score, before it is rounded to the output's format, from the exact dot product.

    Args:
        dtype: Format of the copies.
        lengths: R_a and R_b.
        residuals: ρ_a and ρ_b.
    """
    (length_a, length_b), (residual_a, residual_b) = lengths, residuals
    relative = width * ACCUMULATION_UNIT
    if dtype == torch.int8:
        relative += 3.0 * distortion(width)
    copy_a, copy_b = length_a + residual_a, length_b + residual_b
    return residual_a * length_b + copy_a * (residual_b + relative * copy_b)
