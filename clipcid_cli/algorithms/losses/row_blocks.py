"""Sums over query rows, a block of rows at a time: the one place where losses make logits.

Each loss is a sum over queries, rows of the global batch, of something computed from the query's similarities to all keys.
So a process can take some of the queries (`own`), and a block of them is made, used and forgotten, and made again in the
backward pass: no matrix of all queries by all keys lives when it would be large.

Shape legend: B global batch, b rows of a block, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Blocks of at most this many similarities (64 MiB in float32) live at once.
BLOCK_ENTRIES = 1 << 24

# Queries and keys, [B, D] each; row i of both belongs to sample i.
Sides = tuple[Tensor, Tensor]


def sum_of_blocks(block_sum: Callable[[int, int], Tensor], own: slice, num_rows: int, num_keys: int) -> Tensor:
    """Sum `block_sum(first, stop)` over blocks of the own rows.

    Args:
        block_sum: The sum over query rows first … stop − 1, a scalar. It is called again in the backward pass where there
            is more than one block, and must then return the same.
        own: The query rows of this process.
        num_rows: B.
        num_keys: Keys each query is compared with; decides how many rows make a block.

    Returns:
        A scalar; it does not depend on the size of the blocks beyond rounding.
    """
    first, stop, _ = own.indices(num_rows)
    rows = max(1, BLOCK_ENTRIES // max(1, num_keys))
    if stop - first <= rows:
        return block_sum(first, stop)
    sums = [
        checkpoint(block_sum, start, min(start + rows, stop), use_reentrant=False, preserve_rng_state=False)
        for start in range(first, stop, rows)
    ]
    return torch.stack(sums).sum()


def sum_one_way(block_sum: Callable[..., Tensor], own: slice, *sides: Sides) -> Tensor:
    """Sum over own queries of something computed from their similarities to all keys.

    Args:
        block_sum: Called as ``f(first, *logits)``, with a [b, B] of dot products for each of `sides`, whose row r is of
            query first + r; returns the sum over its rows, a scalar.
        own: The query rows of this process.
        sides: Queries and keys of each matrix of similarities.
    """
    num_rows = len(sides[0][0])

    def block(first: int, stop: int) -> Tensor:
        return block_sum(first, *(queries[first:stop] @ keys.T for queries, keys in sides))

    return sum_of_blocks(block, own, num_rows, num_rows)


def sum_both_ways(block_sum: Callable[..., Tensor], own: slice, *sides: Sides) -> Tensor:
    """`sum_one_way` plus the same with the keys asking and the queries as choices.

    Where this process takes all rows and they fit one block, one matrix serves both ways.
    """
    num_rows = len(sides[0][0])
    if own.indices(num_rows)[:2] == (0, num_rows) and num_rows**2 <= BLOCK_ENTRIES:
        logits: Sequence[Tensor] = [left @ right.T for left, right in sides]
        return block_sum(0, *logits) + block_sum(0, *(matrix.T for matrix in logits))
    return sum_one_way(block_sum, own, *sides) + sum_one_way(block_sum, own, *((right, left) for left, right in sides))
