"""All pairs of two blocks of rows within a distance: low-precision products propose, float64 decides.

The candidates that :func:`clipcid_cli.algorithms.near.block.lowest_score` lets pass are few; those that are worth it are
computed exactly (:mod:`clipcid_cli.algorithms.near.exact`).

On a GPU the host would wait several times for sizes of results that it must know to go on. So a fixed number of the largest
scores is taken there, their pairs are computed, and the host picks those within the distance, by one wait. Where more scores
than that reach the bound the blocks are *crowded*: they are searched again for many more pairs, as the next ones are at
once, and where even those are too few as on a CPU.

Shape letters beside those of the map: S stretches of a row of scores, s scores of a stretch.

Source: docs/method.md#fast-search-exact-result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F

from clipcid_cli.algorithms.near.block import Block, lowest_score, multiply, rounded_error, score_dtype
from clipcid_cli.algorithms.near.edges import Edges
from clipcid_cli.algorithms.near.exact import (
    ROUNDING_MARGIN,
    BoolArray,
    FloatArray,
    IntArray,
    dots_of_pairs,
    edge_weights,
    exact_dots,
)

# Tells, from rows a, rows b and lower bounds of their distances, which pairs are worth computing.
Wants = Callable[[IntArray, IntArray, FloatArray], BoolArray]

# Rows a side of one product: its scores stay near the cores' caches.
_PRODUCT_ROWS = 2048
# Scores whose maximum is taken at once. Most stretches have no candidate: their maxima take a twelfth of the time of a
# comparison of every score, which takes as long as their product (4 ms, int8, 2,048 rows a side, two cores).
_STRETCH = 128
# Of these, most whose candidates are looked for and decided at once: each pair takes up to 150 bytes until it is merged.
_STRETCHES_AT_ONCE = 2**11
# Candidates of as many products as it takes that are decided together.
_MANY_PAIRS = 2**16
# Pairs that are computed for two blocks on a GPU, and stretches that are looked into: of most blocks, and of crowded ones.
_FEW_QUEUED = 2**14
_MANY_QUEUED = 2**18


@dataclasses.dataclass
class Crowding:
    """Whether the blocks that were read last had more near pairs than the few that are queued of most."""

    is_crowded: bool = False


def search_jobs(
    jobs: Iterable[tuple[int, int]], load: Callable[[int], Block], cutoff: float, wants: Wants
) -> Iterator[tuple[tuple[int, int], Iterator[Edges]]]:
    """Search as :func:`near_pairs` the panels of each job; on a GPU each is queued before the one before it is read."""
    crowding = Crowding()
    queued: tuple[tuple[int, int], Iterator[Edges]] | None = None
    for job in jobs:
        pairs = near_pairs(load(job[0]), load(job[1]), cutoff, wants, crowding)
        if queued is not None:
            yield queued
        queued = job, pairs
    if queued is not None:
        yield queued


def bytes_of_scores(device: torch.device, scan_dtype: torch.dtype, panel_rows: int) -> int:
    """Return the bytes of the scores that are held at once: of parts of two panels on a CPU, of two whole ones on a GPU."""
    rows = min(panel_rows, _PRODUCT_ROWS) if device.type == "cpu" else panel_rows
    return rows * (rows + -rows % _STRETCH) * score_dtype(scan_dtype).itemsize


def near_pairs(
    a: Block,
    b: Block,
    cutoff: float,
    wants: Wants = lambda a, b, _: np.ones(len(a), np.bool_),
    crowding: Crowding | None = None,
) -> Iterator[Edges]:
    """Find the pairs of one row of each block that are within a distance.

    Args:
        b: Another block, or the same: then each pair is found once.
        cutoff: Largest distance, inclusive.
        crowding: Of the blocks before.

    Returns:
        Those of them that are wanted, with exact weights, a < b, in pieces of bounded size. They are computed as the pieces
        are taken; on a GPU the work is queued before.
    """
    if a.scan.device.type == "cpu":
        return _decide_products(a, b, cutoff, wants)
    return queue(a, b, cutoff, wants, crowding or Crowding())


def _decide_products(a: Block, b: Block, cutoff: float, wants: Wants) -> Iterator[Edges]:
    lowest = lowest_score(a, b, cutoff).to(a.scan.device)
    buffer = torch.empty(_PRODUCT_ROWS**2, dtype=score_dtype(a.scan.dtype), device=a.scan.device)
    waiting = list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]()
    num_waiting = 0
    for start_j in range(0, len(b), _PRODUCT_ROWS):
        for start_i in range(0, len(a) if a is not b else start_j + 1, _PRODUCT_ROWS):
            score_MN = multiply(
                a.scan[start_i : start_i + _PRODUCT_ROWS], b.scan[start_j : start_j + _PRODUCT_ROWS], buffer
            )
            for i_P, j_P in _find_candidates(score_MN, lowest):
                if a is b and start_i == start_j:
                    above = i_P < j_P
                    i_P, j_P = i_P[above], j_P[above]
                waiting.append((i_P + start_i, j_P + start_j, score_MN[i_P, j_P]))
                num_waiting += len(i_P)
                if num_waiting > _MANY_PAIRS:
                    yield from _decide(a, b, waiting, cutoff, wants)
                    waiting = []
                    num_waiting = 0
    if waiting:
        yield from _decide(a, b, waiting, cutoff, wants)


def _find_candidates(score_MN: torch.Tensor, lowest: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield where scores are not below the lowest, int64 [P] each, in parts of bounded size."""
    # Positive floats order like the integers of their bits (negative ones lie below them), of which a CPU finds the largest
    # in a fifth of the time.
    keys_MN = score_MN
    if score_MN.element_size() == 2 and float(lowest) > 0.0:
        keys_MN, lowest = score_MN.view(torch.int16), lowest.view(torch.int16)
    width = score_MN.shape[1]
    stretch = _STRETCH if width % _STRETCH == 0 else width
    stretch_Ss = keys_MN.view(-1, stretch)
    hit_S = torch.nonzero(stretch_Ss.amax(dim=1) >= lowest)[:, 0]
    for part_S in torch.split(hit_S, max(1, _STRETCHES_AT_ONCE * _STRETCH // stretch)):
        p_P, within_P = torch.nonzero(stretch_Ss[part_S] >= lowest, as_tuple=True)
        entry_P = part_S[p_P] * stretch + within_P
        yield entry_P // width, entry_P % width


def _decide(
    a: Block, b: Block, candidates: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], cutoff: float, wants: Wants
) -> Iterator[Edges]:
    """Yield the wanted candidates within the distance, from their positions in both blocks and their scores."""
    i_P, j_P, score_P = (torch.cat(parts) for parts in zip(*candidates, strict=True))
    highest_P = score_P.double() * (a.step * b.step) + rounded_error(a, b)
    squared_P = a.squared[i_P] + b.squared[j_P] - 2.0 * highest_P
    at_least_P = (squared_P.clamp(min=0.0).sqrt() * (1.0 - ROUNDING_MARGIN)).float()
    i, j = a.rows[i_P.cpu().numpy()], b.rows[j_P.cpu().numpy()]
    small, large = np.minimum(i, j), np.maximum(i, j)
    wanted = np.flatnonzero(wants(small, large, at_least_P.cpu().numpy()))
    if not len(wanted):
        return
    wanted_P = torch.from_numpy(wanted).to(i_P.device)
    i_P, j_P = i_P[wanted_P], j_P[wanted_P]
    weight = edge_weights(a.squared[i_P], b.squared[j_P], exact_dots(a.stored, b.stored, i_P, j_P)).cpu().numpy()
    within = weight <= np.float32(cutoff)
    if within.any():
        yield Edges(small[wanted][within], large[wanted][within], weight[within])


def queue(a: Block, b: Block, cutoff: float, wants: Wants, crowding: Crowding) -> Iterator[Edges]:
    """Queue the comparison of two blocks on a GPU; the iterator that is returned waits for the pairs, and yields them."""
    device = a.scan.device
    most = _MANY_QUEUED if crowding.is_crowded else _FEW_QUEUED
    # Rows of zeros make whole stretches of the scores. Their scores are 0, and so are those of each pair's second place:
    # where even 0 reaches the lowest score the blocks are crowded, or all of their pairs are computed.
    padding = -len(b) % _STRETCH
    width = len(b) + padding
    score_MN = multiply(a.scan, F.pad(b.scan, (0, 0, 0, padding)) if padding else b.scan)
    if a is b:
        score_MN.triu_(1)
    stretch_Ss = score_MN.view(-1, _STRETCH)
    largest_S, place_S = _top(stretch_Ss.amax(dim=1), most)
    score_P, place_P = _top(stretch_Ss[place_S].view(-1), most)
    entry_P = torch.add(place_P % _STRETCH, place_S[place_P // _STRETCH], alpha=_STRETCH)
    i_P, j_P = entry_P // width, entry_P % width
    if padding:
        j_P.clamp_(max=len(b) - 1)
    weight_P = edge_weights(a.squared[i_P], b.squared[j_P], dots_of_pairs(a.stored, b.stored, i_P, j_P))
    is_crowded = torch.maximum(largest_S.amin(), score_P.amin()) >= float(lowest_score(a, b, cutoff))
    # All are exact in float64: one copy to the host's pinned memory, which does not wait.
    results = torch.cat([entry_P.double(), weight_P.double(), is_crowded.double()[None]]).to("cpu", non_blocking=True)
    done = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]  # PyTorch's
    if done is not None:
        done.record()

    def read() -> Iterator[Edges]:
        if done is not None:
            done.synchronize()
        values = results.numpy()
        crowding.is_crowded = bool(values[-1])
        if crowding.is_crowded:
            is_last = most == _MANY_QUEUED
            yield from _decide_products(a, b, cutoff, wants) if is_last else queue(a, b, cutoff, wants, crowding)
            return
        entry, weight = np.split(values[:-1], 2)
        i, j = np.divmod(entry.astype(np.int64), width)
        near = (weight <= np.float32(cutoff)) & (j < len(b))
        # Not all scores that reach the bound are of near pairs.
        crowding.is_crowded = int(np.count_nonzero(near)) > _FEW_QUEUED // 2
        if a is b:
            near &= i < j
        one, other = a.rows[i[near]], b.rows[j[near]]
        edges = Edges(np.minimum(one, other), np.maximum(one, other), weight[near].astype(np.float32))
        edges = edges[wants(edges.a, edges.b, edges.weight)]
        if len(edges):
            yield edges

    return read()


def _top(score_S: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the largest scores, so many at most, in any order, and their places."""
    values, places = score_S.topk(min(most, len(score_S)), sorted=False)
    return values, places
