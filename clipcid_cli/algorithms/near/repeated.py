"""Which rows occur among others too: the same images, whatever they are called."""

from __future__ import annotations

import torch

# What rounding makes of one image in batches of other sizes: far below the distance of two images.
_SAME = 1e-5
# Rows that are compared with each: where more are as near by their projection, as of a model that tells no image apart, the
# first stand for all.
_MOST = 64
_ROWS_AT_ONCE = 2**14


def find_repeated(rows_ND: torch.Tensor, others_MD: torch.Tensor) -> torch.Tensor:
    """Tell which unit rows equal one of the others but for rounding: bool [N].

    Equal rows are at one place on any line: only those there are compared, so that it takes N log M steps.
    """
    line_D = torch.randn(rows_ND.shape[1], generator=torch.Generator().manual_seed(0)).to(rows_ND.device)
    line_D /= line_D.norm()
    sorted_M, order_M = (others_MD @ line_D).sort()
    is_repeated_N = torch.zeros(len(rows_ND), dtype=torch.bool, device=rows_ND.device)
    for start in range(0, len(rows_ND), _ROWS_AT_ONCE):
        rows = rows_ND[start : start + _ROWS_AT_ONCE]
        places = rows @ line_D
        first = torch.searchsorted(sorted_M, places - _SAME)
        last = torch.searchsorted(sorted_M, places + _SAME, right=True)
        is_repeated = is_repeated_N[start : start + _ROWS_AT_ONCE]  # a view
        for step in range(min(_MOST, int((last - first).max()))):
            left = torch.nonzero((first + step < last) & ~is_repeated)[:, 0]
            others = others_MD[order_M[first[left] + step]]
            is_repeated[left] = torch.linalg.vector_norm(rows[left] - others, dim=1) < _SAME
    return is_repeated_N
