"""Rows as small integers, the operands of the fastest matrix product of some CPUs, and the error of the copy.

**Rotate**: an orthogonal matrix T spreads the length of a few columns over all (embeddings of CLIP models have columns many
times as large as the rest), since the largest entry decides the step of all others; on features of photographs of width
1,280 it cut the residual from 0.039 to 0.012. With D = a·b, a row with random signs is read as a matrix [a, b] and
multiplied by Hartley's orthogonal matrices of a and b: T = (H_a ⊗ H_b)·diag(±1) costs a + b multiplications an entry instead
of D, and a single column ends in entries of at most 2/√D. **Round**: a step s scales the rotated row to integers q of at
most 127; s has 8 significant bits, which makes s·q exact in float32.

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

_LARGEST_INT8 = 127
# The rounding of a CPU's own float32 arithmetic.
_ROUNDING_UNIT = 2.0**-24


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
    matrices, apart = list[torch.Tensor](), 1.0
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
    left = next(size for size in range(math.isqrt(width), 0, -1) if width % size == 0)
    return left, width // left
