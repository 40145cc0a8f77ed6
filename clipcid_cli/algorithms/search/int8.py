"""Rows as small integers, the operands of the fastest matrix product of some CPUs, and the error of the copy.

**Rotate**: an orthogonal matrix T spreads the length of a few columns over all (embeddings of CLIP models have columns many
times as large as the rest), since the largest entry decides the step of all others; on features of photographs of width
1,280 it cut the residual from 0.039 to 0.012. **Round**: a step s scales the rotated row to integers q of at most 127;
s has 8 significant bits, which makes s·q exact in float32.

Of two rows a, b with rotated rows Ta, Tb: |Ta| ≤ |a|·√(1 + η) and |a·b − Ta·Tb| = |aᵀ(TᵀT − I)b| ≤ η·|a||b| with
η = |TᵀT − I|, the :func:`distortion`. A product of integers is added up in int32 without error up to a width of 133,000.

Shape letters: N rows, D width.

Source: docs/method.md#fast-search-exact-result.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch

LARGEST_INT8 = 127
# The rounding of a CPU's own float32 arithmetic.
_ROUNDING_UNIT = 2.0**-24


def rotate(rows_ND: torch.Tensor) -> torch.Tensor:
    """Return the rotated rows T·a, float32 [N, D], each off by at most :func:`rotation_error` times its length."""
    rotation_DD, _ = _rotation(rows_ND.shape[1])
    return rows_ND.float() @ rotation_DD.T


def rotation_error(width: int) -> float:
    """Bound how far a computed rotated row of length 1 is from the exact one.

    D rounded steps an entry make it off by at most D·2⁻²⁴·|T_i||a| (Higham §3.1), and all D of them by √D times that.
    """
    return 1.001 * math.sqrt(width) * (width + 1) * _ROUNDING_UNIT


def distortion(width: int) -> float:
    """Return |TᵀT − I| in the Frobenius norm, at most."""
    return _rotation(width)[1]


def round_to_int8(rotated_ND: torch.Tensor, steps: torch.Tensor | float) -> torch.Tensor:
    """Return the integers q nearest to a rotated row over its step, int8 [N, D]; [N, 2] with a column of zeros for D = 1.

    Args:
        rotated_ND: float32 [N, D].
        steps: One for all, or [N, 1]; at least a 127th of the largest entry.
    """
    rounded_ND = (rotated_ND / steps).round_().to(torch.int8)
    # PyTorch 2.13 returns what was in memory for products of one column.
    return rounded_ND if rounded_ND.shape[1] > 1 else torch.nn.functional.pad(rounded_ND, (0, 1))


def choose_steps(largest: torch.Tensor) -> torch.Tensor:
    """Return the smallest numbers of 8 significant bits that scale the given largest entries to 127; 1 for 0.

    Args:
        largest: Largest absolute entries, float32 of any shape.
    """
    fraction, exponent = torch.frexp(largest.double() / LARGEST_INT8)
    steps = torch.ldexp(torch.ceil(fraction * 2**8), exponent - 8)
    return torch.where(largest > 0, steps, 1.0).float()


@lru_cache(maxsize=4)
def _rotation(width: int) -> tuple[torch.Tensor, float]:
    """Return an orthogonal matrix T, float32 [D, D], and how far it is from one: |TᵀT − I| in the Frobenius norm, at most.

    Another matrix would change which pairs are decided exactly, never the result.
    """
    gaussian = np.random.default_rng(0).standard_normal((width, width))
    rotation_DD = np.linalg.qr(gaussian)[0].astype(np.float32)
    wide_DD = rotation_DD.astype(np.float64)
    # The float64 product is itself off by less than 1e-12 at any width that embeddings have.
    return torch.from_numpy(rotation_DD), float(np.linalg.norm(wide_DD.T @ wide_DD - np.eye(width))) + 1e-9
