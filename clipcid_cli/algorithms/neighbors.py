"""All pairs of rows within a distance: proposed by a fast, low-precision matrix product, decided exactly.

The rows are cut into panels, and the tiles of the upper triangle (panel i with panel j, i ≤ j) are searched one by one, in
any order and on any number of processes. A tile's dot products are computed in whatever format the machine multiplies
fastest (bfloat16 on CPUs with matrix units, float16 on GPUs, float32 elsewhere); the few entries that may be near enough are
recomputed exactly (:mod:`clipcid_cli.algorithms.distances`). Low precision only discards, within the bound proven at
:func:`lowest_score`.

Shape letters: N rows, D width, M and N also rows of two blocks, P pairs.

Source: METHOD §1 [O], "Exact at low-precision speed".
"""

from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch

from clipcid_cli.algorithms.distances import (
    LONGEST_ROW,
    ROWS_IN_CACHE,
    FloatArray,
    IntArray,
    ReadRows,
    selected_distances,
    squared_lengths,
)
from clipcid_cli.algorithms.forest import Edges

# Rows multiplied at once on each side: the scores of one product stay near the cores' caches.
_BLOCK_ROWS = 2048
_LARGEST_PANEL = 8 * _BLOCK_ROWS
# Panels kept for the next tiles, at most, in the format of the fast product and as stored.
_REMEMBERED_BYTES = 2**30
# Scores whose maximum is taken at once.
_STRETCH = 128
# Proposed pairs that are decided at once.
_MANY_PAIRS = 2**16
# Enough panels that a handful of processes get equal shares and a killed run loses little.
_SMALLEST_NUM_PANELS = 8

# Largest relative error of one fused step of a float32 accumulation, 2⁻²⁴ where it is rounded; matrix units may truncate
# and align a few products at a time, which four times that covers.
_ACCUMULATION_UNIT = 2.0**-22

# Tells, from rows a, rows b and lower bounds of the distances, which pairs are of use.
Wanted = Callable[[IntArray, IntArray, FloatArray], npt.NDArray[np.bool_]]


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What holds for all rows of a block.

    Attributes:
        shortest: Smallest length.
        longest: Largest length.
        residual: Largest length of a stored row minus its copy in the format of the fast product, rounded up.
    """

    shortest: float
    longest: float
    residual: float


@dataclasses.dataclass(frozen=True)
class Block:
    """Rows on the device, ready to be compared.

    Attributes:
        rows: Row numbers, int64 [N].
        stored: The rows as stored, float16 [N, D].
        scan: The same in the format of the fast product.
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

    def __len__(self) -> int:
        return len(self.rows)


def load_block(read: ReadRows, rows: IntArray, device: torch.device, scan_dtype: torch.dtype) -> Block:
    """Read rows and prepare them for comparison.

    Args:
        read: Reads stored rows.
        rows: Row numbers, int64 [N], N ≥ 1.
        device: Where to compare.
        scan_dtype: Format of the fast product.

    Raises:
        ValueError: when a row is not finite or longer than ``LONGEST_ROW``, for which the distances would be inexact.
    """
    stored = _read_stored(read, rows, device)
    squared = squared_lengths(stored)
    low, high = squared.aminmax()
    if not float(high) <= LONGEST_ROW**2:
        raise ValueError(f"rows must be finite and no longer than {LONGEST_ROW}, not {math.sqrt(float(high)):.3g}")
    scan = stored.to(scan_dtype)
    residual = 0.0
    if scan_dtype == torch.bfloat16:
        # The differences are exact in float32; their length has a relative error far below the 1e-4 added.
        parts = zip(torch.split(stored, ROWS_IN_CACHE), torch.split(scan, ROWS_IN_CACHE), strict=True)
        residual = float(torch.stack([(a.float() - b.float()).norm(dim=1).max() for a, b in parts]).max()) * (1 + 1e-4)
    return Block(rows, stored, scan, squared, Bounds(math.sqrt(float(low)), math.sqrt(float(high)), residual))


def _read_stored(read: ReadRows, rows: IntArray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(read(rows))).to(device)


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
    round(s) ≥ round(t), so comparing with t rounded down (as :func:`_propose` does) loses nothing and needs no slack.

    Returns:
        The bound t, which still has to be rounded down to the output's format.
    """
    beyond = float(np.nextafter(np.float32(cutoff), np.float32(np.inf)))
    needed = (a.bounds.shortest**2 + b.bounds.shortest**2 - beyond**2) / 2.0
    return needed - score_error(a, b)


def score_error(a: Block, b: Block) -> float:
    """Return the largest difference of a fast score from the exact dot product, before its last rounding."""
    width, one, other = a.scan.shape[1], a.bounds, b.bounds
    conversion = one.residual * other.longest + (one.longest + one.residual) * other.residual
    lengths = (one.longest + one.residual) * (other.longest + other.residual)
    accumulation = width * _ACCUMULATION_UNIT * lengths
    # 2⁻¹⁴ for GPUs that flush float16's subnormals to zero; it also swallows the rounding of this very formula.
    return conversion + accumulation + 2.0**-14


class Join:
    """The search of some rows for pairs within a distance, cut into tiles.

    Attributes:
        rows: Rows to compare, int64 [N], each once.
        panel_rows: Rows a side of a tile.
    """

    def __init__(
        self,
        read: ReadRows,
        rows: IntArray,
        device: torch.device,
        scan_dtype: torch.dtype,
        panel_rows: int | None = None,
    ) -> None:
        """Cut the work into tiles.

        Args:
            read: Reads stored rows.
            rows: Rows to compare, int64 [N], each once.
            device: Where to compare.
            scan_dtype: Format of the fast product: bfloat16, float16 or float32.
            panel_rows: Rows a side of a tile; by default some panels of whole blocks.
        """
        if panel_rows is None:
            even = -(-len(rows) // _SMALLEST_NUM_PANELS)
            panel_rows = min(_LARGEST_PANEL, max(1, -(-even // _BLOCK_ROWS)) * _BLOCK_ROWS)
        self.rows, self.panel_rows = rows, panel_rows
        self._read, self._device, self._scan_dtype = read, device, scan_dtype
        self._scores = torch.empty(_BLOCK_ROWS * _BLOCK_ROWS, dtype=scan_dtype, device=device)
        self._panels: OrderedDict[int, Block] = OrderedDict()
        self._known: dict[int, tuple[torch.Tensor, Bounds]] = {}

    def tiles(self) -> list[tuple[int, int]]:
        """List the tiles (panel i, panel j), i ≤ j, to and fro: panels last read are the next ones needed."""
        num_panels = -(-len(self.rows) // self.panel_rows)
        return [
            (i, j)
            for i in range(num_panels)
            for j in (range(i, num_panels) if i % 2 == 0 else range(num_panels - 1, i - 1, -1))
        ]

    def num_pairs(self, tile: tuple[int, int]) -> int:
        """Count the pairs of rows a tile compares."""
        i, j = tile
        size_i, size_j = len(self.panel_rows_of(i)), len(self.panel_rows_of(j))
        return size_i * (size_i - 1) // 2 if i == j else size_i * size_j

    def panel(self, index: int) -> Block:
        """Read a panel, or take it from those that are remembered, of at most ``_REMEMBERED_BYTES``.

        Lengths and bounds are computed the first time and remembered of every panel, 8 bytes a row.
        """
        if index in self._panels:
            self._panels.move_to_end(index)
            return self._panels[index]
        rows = self.panel_rows_of(index)
        if index not in self._known:
            panel = load_block(self._read, rows, self._device, self._scan_dtype)
            self._known[index] = panel.squared, panel.bounds
        else:
            stored = _read_stored(self._read, rows, self._device)
            panel = Block(rows, stored, stored.to(self._scan_dtype), *self._known[index])
        self._panels[index] = panel
        room = max(2, _REMEMBERED_BYTES // (panel.stored.nbytes + panel.scan.nbytes))
        while len(self._panels) > room:
            self._panels.popitem(last=False)
        return panel

    def search_tile(self, tile: tuple[int, int], cutoff: float, wanted: Wanted) -> Iterator[Edges]:
        """Read the panels of a tile and :meth:`search` them."""
        i, j = tile
        panel_i = self.panel(i)
        yield from self.search(panel_i, panel_i if i == j else self.panel(j), cutoff, wanted)

    def search(self, panel_i: Block, panel_j: Block, cutoff: float, wanted: Wanted) -> Iterator[Edges]:
        """Find the pairs of one row of each panel that are within a distance.

        Args:
            panel_i: A panel.
            panel_j: Another, or the same: then each pair is found once.
            cutoff: Largest distance, inclusive.
            wanted: Which pairs, told from lower bounds of their distances, are worth computing.

        Yields:
            The wanted pairs within the distance, with exact weights, a < b, in pieces of bounded size.
        """
        lowest = lowest_score(panel_i, panel_j, cutoff)
        waiting: list[_Proposed] = []
        num_waiting = 0
        with _exact_accumulation(self._device):
            for start_j in range(0, len(panel_j), _BLOCK_ROWS):
                b = panel_j.scan[start_j : start_j + _BLOCK_ROWS]
                for start_i in range(0, len(panel_i), _BLOCK_ROWS):
                    if panel_i is panel_j and start_i > start_j:
                        break
                    a = panel_i.scan[start_i : start_i + _BLOCK_ROWS]
                    is_diagonal = panel_i is panel_j and start_i == start_j
                    found = _propose(a, b, lowest, self._scores, is_diagonal).moved(start_i, start_j)
                    # Few pairs of many blocks are decided together; many of one block at once, by a matrix product.
                    if len(found) > _MANY_PAIRS:
                        yield from _decide(panel_i, panel_j, [found], cutoff, wanted)
                    elif len(found):
                        waiting.append(found)
                        num_waiting += len(found)
                    if num_waiting > _MANY_PAIRS:
                        yield from _decide(panel_i, panel_j, waiting, cutoff, wanted)
                        waiting, num_waiting = [], 0
            if waiting:
                yield from _decide(panel_i, panel_j, waiting, cutoff, wanted)

    def panel_rows_of(self, index: int) -> IntArray:
        """Return the row numbers of a panel."""
        return self.rows[index * self.panel_rows : (index + 1) * self.panel_rows]


@dataclasses.dataclass(frozen=True)
class _Proposed:
    """Pairs that may be near enough.

    Attributes:
        i: Positions in one block, int64 [P].
        j: Positions in the other, int64 [P].
        score: Fast scores [P].
    """

    i: torch.Tensor
    j: torch.Tensor
    score: torch.Tensor

    def __len__(self) -> int:
        return len(self.score)

    def moved(self, start_i: int, start_j: int) -> _Proposed:
        return _Proposed(self.i + start_i, self.j + start_j, self.score)


def _decide(a: Block, b: Block, proposed: list[_Proposed], cutoff: float, wanted: Wanted) -> Iterator[Edges]:
    """Yield the wanted ones of the proposed pairs that are within the distance, with exact weights."""
    i_P, j_P, score_P = (torch.cat([getattr(each, name) for each in proposed]) for name in ("i", "j", "score"))
    at_least_P = _lowest_distances(a, b, i_P, j_P, score_P)
    i, j = i_P.cpu().numpy(), j_P.cpu().numpy()
    smaller, larger = np.minimum(a.rows[i], b.rows[j]), np.maximum(a.rows[i], b.rows[j])
    use = wanted(smaller, larger, at_least_P.cpu().numpy())
    if not use.any():
        return
    chosen = torch.from_numpy(use).to(i_P.device)
    weight = selected_distances(a.stored, b.stored, a.squared, b.squared, i_P[chosen], j_P[chosen])
    edges = Edges(smaller[use], larger[use], weight.cpu().numpy())
    within = edges[edges.weight <= np.float32(cutoff)]
    if len(within):
        yield within


def _propose(
    a_MD: torch.Tensor, b_ND: torch.Tensor, lowest: float, buffer: torch.Tensor, is_diagonal: bool
) -> _Proposed:
    """Return the pairs whose fast score is not below `lowest`; of a block with itself, those with i < j."""
    scores_MN = buffer[: len(a_MD) * len(b_ND)].view(len(a_MD), len(b_ND))
    torch.mm(a_MD, b_ND.T, out=scores_MN)
    if is_diagonal:
        scores_MN.fill_diagonal_(-math.inf)
    bound = _round_down(lowest, scores_MN.dtype).to(scores_MN.device)
    # Positive floats order like integers of their bits (and negative ones lie below them), which CPUs compare faster;
    # and most stretches of a row have no hit, which their maximum tells many times faster than a comparison of all entries.
    keys_MN, key = scores_MN, bound
    if float(bound) > 0.0 and scores_MN.element_size() == 2:
        keys_MN, key = scores_MN.view(torch.int16), bound.view(torch.int16)
    stretch = _STRETCH if len(b_ND) % _STRETCH == 0 else len(b_ND)
    stretches_SW = keys_MN.view(-1, stretch)
    hit_S = torch.nonzero(stretches_SW.amax(dim=1) >= key)[:, 0]
    p_P, within_P = torch.nonzero(stretches_SW[hit_S] >= key, as_tuple=True)
    entry_P = hit_S[p_P] * stretch + within_P
    i_P, j_P = entry_P // len(b_ND), entry_P % len(b_ND)
    if is_diagonal:
        above = i_P < j_P
        i_P, j_P = i_P[above], j_P[above]
    return _Proposed(i_P, j_P, scores_MN[i_P, j_P])


def _lowest_distances(a: Block, b: Block, i_P: torch.Tensor, j_P: torch.Tensor, score_P: torch.Tensor) -> torch.Tensor:
    """Bound the distances of proposed pairs from below, float32 [P]."""
    _, highest_P = score_bounds(a, b, score_P)
    squared_P = a.squared[i_P] + b.squared[j_P] - 2.0 * highest_P
    # Going to float32 may round up by one unit; the factor takes two off.
    return (squared_P.clamp(min=0.0).sqrt() * (1.0 - 2.0**-22)).to(torch.float32)


def score_bounds(a: Block, b: Block, score_P: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bound the dot products behind fast scores [P] from below and above, float64 [P] each."""
    # Beside the errors before it, the rounding of the output: half a unit in the last place, eps/2 of the score.
    rounding = torch.finfo(score_P.dtype).eps
    score_P = score_P.to(torch.float64)
    error_P = score_P.abs() * rounding + score_error(a, b)
    return score_P - error_P, score_P + error_P


def _round_down(value: float, dtype: torch.dtype) -> torch.Tensor:
    """Return the largest number of the format that is at most `value`, as a tensor without dimensions."""
    rounded = torch.tensor(value, dtype=torch.float64).to(dtype)
    if float(rounded) > value:
        rounded = torch.nextafter(rounded, torch.tensor(-math.inf, dtype=dtype))
    return rounded


@contextmanager
def _exact_accumulation(device: torch.device) -> Iterator[None]:
    """Keep GPUs from adding up partial products in less than float32, as the bound of the scores requires."""
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
