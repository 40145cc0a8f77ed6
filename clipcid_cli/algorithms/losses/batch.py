"""What a loss is computed from: the features of one global batch, and logits of them, a block of query rows at a time.

Each loss is a sum over queries, rows of the global batch, of something computed from the query's similarities to all keys.
So a process can take some of the queries (`own`), and a block of them is made, used and forgotten, and made again in the
backward pass: no matrix of all queries by all keys lives when it would be large.

Shape legend: B global batch, b own rows or rows of a block, E texts without images, d student width, D width of the shared
space, L patches or tokens, S candidate centroids.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from clipcid_cli.algorithms.losses.registry import AFFINITY_SCALE

# Blocks hold at most this many similarities, 32 MiB in float32; with their gradients a few of that size live at once. A sum
# of more keeps none of them for the backward pass, on any device: each loss makes several such matrices.
BLOCK_ENTRIES = 1 << 23
# On a GPU, where the host launches each block, at most 1 GiB in float32, and this part of the card's memory. Not of what
# is free: sums in other blocks have other last bits, and a resumed run gives those of one that was never stopped.
_GPU_BLOCK_ENTRIES = 1 << 28
_GPU_PARTS = 64


@dataclasses.dataclass(frozen=True)
class ClusterTargets:
    """Candidate centroids of one batch, and what the teacher's distribution over clusters makes of each sample."""

    centroids_SD: Tensor  # unit rows, float32
    # Added to the logits, so that the drawn candidates represent all centroids that are not active: 0 for active ones,
    # log((K − |A|) / |R|) for drawn ones; float32.
    log_correction_S: Tensor
    # Mean centroid of the target distribution of each own row, whose clusters need not all be candidates, float32.
    mean_bD: Tensor


@dataclasses.dataclass(frozen=True)
class LossBatch:
    """Features of one global batch; all rows are of unit length, row i of each belongs to sample i.

    What no loss of the run needs is None; so are features and clusters of a tower that the teacher lacks.

    Every loss returns its **share**: the sum over the own rows as queries, divided by the number of rows of all processes.
    That is B; in a mean over texts that takes those without images, too, B + `num_extra`. The shares of all processes add
    up to the loss of the global batch; with all rows the share is that loss. Own rows are compared with all rows.
    """

    image_Bd: Tensor
    text_Bd: Tensor  # the teacher's rows where the text tower is its own; no rows where such a run has no captions
    student_scale: Tensor  # exp(logit_scale) of the student
    image_BD: Tensor  # student image features s' in the shared space; `image_Bd` itself when no map is learned
    text_BD: Tensor  # student text features v' there
    teacher_image_BD: Tensor | None = None  # teacher image features t there
    teacher_text_BD: Tensor | None = None  # teacher text features u there
    student_bias: Tensor | None = None  # its logit_bias
    teacher_scale: float | None = None  # exp(logit_scale) of the teacher
    teacher_bias: float | None = None  # its logit_bias; None where it was trained with a softmax
    affinity_scale: float = AFFINITY_SCALE  # of the teacher's similarities in `affinity`
    image_clusters: ClusterTargets | None = None
    # The same for the captions, with the same candidates; present for ``--cluster-towers both``.
    text_clusters: ClusterTargets | None = None
    masked_image_BD: Tensor | None = None  # student image features there of a pass that saw few patches of each image
    # Student features there of the patches of the own rows' images, or 0 where there is none.
    image_tokens_bLD: Tensor | None = None
    text_tokens_bLD: Tensor | None = None  # those of the tokens of the own rows' captions
    # Student features v' of texts without images: this process's own, all where `own` is all.
    extra_text_ED: Tensor | None = None
    teacher_extra_text_ED: Tensor | None = None  # the teacher's features u of the same texts
    # Numbers of each sample by name, float32 [B] each; a loss is called with those that it reads.
    sample_inputs: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    num_extra: int = 0  # texts without images in the global batch
    trains_text: bool = True  # whether there is a text tower that the pairs of single rows can train
    # The rows whose queries this process takes, a slice without a stride; all by default.
    own: slice = dataclasses.field(default_factory=lambda: slice(None))

    def __len__(self) -> int:
        return len(self.image_Bd)

    def teacher(self) -> tuple[Tensor, Tensor]:
        """Return t and u, [B, D] each, of a teacher with both towers."""
        assert self.teacher_image_BD is not None
        assert self.teacher_text_BD is not None
        return self.teacher_image_BD, self.teacher_text_BD

    def bias(self) -> Tensor:
        assert self.student_bias is not None
        return self.student_bias

    def same_tower_pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Return (s', t) and (v', u), without a pair whose teacher tower is missing, or whose text tower is not trained."""
        of_text = self.teacher_text_BD if self.trains_text else None
        pairs = ((self.image_BD, self.teacher_image_BD), (self.text_BD, of_text))
        return [(student, teacher) for student, teacher in pairs if teacher is not None]

    def cross_tower_pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Return (s', u) and (v', t), without a pair whose teacher tower is missing, or whose text tower is not trained."""
        of_text = self.teacher_image_BD if self.trains_text else None
        pairs = ((self.image_BD, self.teacher_text_BD), (self.text_BD, of_text))
        return [(student, teacher) for student, teacher in pairs if teacher is not None]


@dataclasses.dataclass(frozen=True)
class Similarities:
    """Logits of queries and keys, made a block of rows at a time; row i of both sides belongs to sample i."""

    left_BD: Tensor
    right_BD: Tensor
    scale: Tensor | float  # logit scale σ (not its logarithm), a scalar

    def rows(self, first: int, stop: int) -> Tensor:
        """Return σ·left·rightᵀ for left rows first … stop − 1, [b, B]."""
        left_bD = rows_between(self.left_BD, first, stop)
        # The scale goes to the smaller of the two: with its gradient it is read and written several times.
        if len(self.right_BD) > self.right_BD.shape[1]:
            return (self.scale * left_bD) @ self.right_BD.T
        return torch.mul(left_bD @ self.right_BD.T, self.scale)

    def of_each_row(self, function: Callable[[int, Tensor], Tensor], first: int, stop: int) -> Tensor:
        """Return what `function(start, logits)` makes of each of the left rows first … stop − 1, [b]."""

        def block(start: int, end: int) -> Tensor:
            return function(start, self.rows(start, end))

        return torch.cat(over_blocks(block, first, stop, len(self.right_BD), self.right_BD.device))

    def transposed(self) -> Similarities:
        return Similarities(self.right_BD, self.left_BD, self.scale)


def rows_between(rows_BD: Tensor, first: int, stop: int) -> Tensor:
    """Return rows first … stop − 1; all of them without a slice, whose gradient would be a copy."""
    return rows_BD if (first, stop) == (0, len(rows_BD)) else rows_BD[first:stop]


def add(sums: Sequence[Tensor]) -> Tensor:
    """Add scalars, one at least."""
    return functools.reduce(torch.add, sums)


def block_entries(device: torch.device) -> int:
    """Return how many similarities a block holds at most; never fewer than on a CPU."""
    if device.type != "cuda":
        return BLOCK_ENTRIES
    memory = torch.cuda.get_device_properties(device).total_memory
    return max(BLOCK_ENTRIES, min(_GPU_BLOCK_ENTRIES, memory // _GPU_PARTS // 4))


def over_blocks(
    function: Callable[[int, int], Tensor], first: int, stop: int, width: int, device: torch.device
) -> list[Tensor]:
    """Return what `function(start, end)` makes of each block of first … stop − 1.

    Args:
        function: Where together the blocks hold more than `BLOCK_ENTRIES` it is called again in the backward pass, and must
            then return the same.
        width: Similarities of each row; with the device it decides how many rows make a block.
    """
    if (stop - first) * width <= BLOCK_ENTRIES:
        return [function(first, stop)]
    rows = max(1, block_entries(device) // width)
    return [
        checkpoint(function, start, min(start + rows, stop), use_reentrant=False, preserve_rng_state=False)
        for start in range(first, stop, rows)
    ]


def sum_one_way(block_sum: Callable[..., Tensor], own: slice, *compared: Similarities) -> Tensor:
    """Sum over own queries of something computed from their similarities to all keys.

    Args:
        block_sum: Called as ``f(first, *logits)``, with a [b, B] of each of `compared`, whose row r is of query first + r;
            returns the sum over its rows, a scalar.
        compared: The left sides are the queries.
    """
    num_rows = len(compared[0].left_BD)

    def block(first: int, stop: int) -> Tensor:
        return block_sum(first, *(similarities.rows(first, stop) for similarities in compared))

    first, stop, _ = own.indices(num_rows)
    return add(over_blocks(block, first, stop, num_rows, compared[0].left_BD.device))


def sum_both_ways(block_sum: Callable[..., Tensor], own: slice, *compared: Similarities) -> Tensor:
    """`sum_one_way` plus the same with the right sides as queries.

    Where this process takes all rows and they fit one block, one matrix serves both ways.
    """
    num_rows = len(compared[0].left_BD)
    device = compared[0].left_BD.device
    if own.indices(num_rows)[:2] == (0, num_rows) and num_rows**2 <= block_entries(device):

        def both_ways(first: int, stop: int) -> Tensor:
            logits = [similarities.rows(first, stop) for similarities in compared]
            return block_sum(0, *logits) + block_sum(0, *(matrix.T for matrix in logits))

        return add(over_blocks(both_ways, 0, num_rows, num_rows, device))
    transposed = [similarities.transposed() for similarities in compared]
    return sum_one_way(block_sum, own, *compared) + sum_one_way(block_sum, own, *transposed)
