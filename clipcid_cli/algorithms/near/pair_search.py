"""All pairs of rows within a distance: filtered by a fast, low-precision matrix product, refined exactly.

The rows are cut into panels, and the tiles of the upper triangle (panel i with panel j, i ≤ j) are searched one by one, in
any order and on any number of processes. A tile's dot products are computed in whatever format the machine multiplies
fastest (bfloat16 on CPUs with matrix units, int8 on those with dot-product instructions, float16 on GPUs, float32
elsewhere); the few candidates that may be near enough are recomputed exactly
(:mod:`clipcid_cli.algorithms.near.distances`).
Low precision only discards, within the bound proven at :func:`clipcid_cli.algorithms.near.blocks.lowest_score`.

Shape letters: N rows, D width, M and N also rows of two blocks, P pairs.

Source: docs/method.md#fast-search-exact-result.
"""

from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import numpy.typing as npt
import torch

from clipcid_cli.algorithms.near.blocks import (
    Block,
    exact_accumulation,
    load_block,
    lowest_score,
    multiply,
    reload_block,
    score_bounds,
    score_dtype,
    score_threshold,
)
from clipcid_cli.algorithms.near.distances import (
    ROUNDING_MARGIN,
    FloatArray,
    IntArray,
    ReadRows,
    distance_matrix,
    occurring,
    selected_distances,
)
from clipcid_cli.algorithms.near.edges import Edges
from clipcid_cli.algorithms.near.queued import QueuedTile
from clipcid_cli.algorithms.near.tiles import GrownTiles, Tile, Tiles, TriangleTiles

# Rows a side of one product: its scores stay near the cores' caches.
_BLOCK_ROWS = 2048
_LARGEST_PANEL = 8 * _BLOCK_ROWS
# Limit of the panels cached for the next tiles, in the format of the fast product and as stored.
CACHE_BYTES = 2**30
# Scores whose maximum is taken at once.
_STRETCH = 128
# Of these, most whose candidates are looked for and refined at once: each pair takes up to 150 bytes until it is merged.
_STRETCHES_AT_ONCE = 2**11
# Candidates that are refined at once.
_MANY_PAIRS = 2**16
# Where at least one entry in this many is a candidate, a float32 product of their rows filters once more (measured: an entry
# takes 2.6 ns on two cores, a pair refined on its own 1.3 µs).
_ENTRIES_PER_PAIR = 256
# Where at least one entry in this many is a candidate, the exact matrix takes less time than lists of pairs.
_ENTRIES_PER_DENSE_PAIR = 4
# Enough panels that a handful of processes get equal shares and a killed run loses little.
_SMALLEST_NUM_PANELS = 8

# Tells, from rows a, rows b and lower bounds of their distances, which pairs are worth computing.
PairFilter = Callable[[IntArray, IntArray, FloatArray], npt.NDArray[np.bool_]]


def default_panel_rows(num_rows: int) -> int:
    """Choose the rows a side of a tile: some panels of whole blocks."""
    even = -(-num_rows // _SMALLEST_NUM_PANELS)
    return min(_LARGEST_PANEL, max(1, -(-even // _BLOCK_ROWS)) * _BLOCK_ROWS)


class TiledSearch:
    """A search among some rows for pairs within a distance, divided into tiles.

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
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        """Divide the work into tiles.

        Args:
            rows: Rows to compare, int64 [N], each once.
            scan_dtype: Format of the fast product: int8, bfloat16, float16 or float32.
            panel_rows: Rows a side of a tile, by default :func:`default_panel_rows`.
            cache_bytes: Memory for the panels of the next tiles.
        """
        self.rows, self.panel_rows = rows, default_panel_rows(len(rows)) if panel_rows is None else panel_rows
        self._read, self._device, self._scan_dtype = read, device, scan_dtype
        self._scores = torch.empty(_BLOCK_ROWS * _BLOCK_ROWS, dtype=score_dtype(scan_dtype), device=device)
        self._cache_bytes = cache_bytes
        self._panels: OrderedDict[int, Block] = OrderedDict()
        self._bounds: dict[int, Block] = {}

    @property
    def name(self) -> str:
        """Identifies how the work is divided."""
        return f"strips-{self.panel_rows}"

    def tiles(self) -> Tiles:
        """Return the tiles (panel i, panel j), i ≤ j."""
        return TriangleTiles(-(-len(self.rows) // self.panel_rows))

    @property
    def num_all_pairs(self) -> int:
        """Number of pairs that all tiles compare."""
        return len(self.rows) * (len(self.rows) - 1) // 2

    def num_pairs(self, tile: tuple[int, int]) -> int:
        """Count the pairs of rows a tile compares."""
        i, j = tile
        size_i, size_j = len(self.panel_rows_of(i)), len(self.panel_rows_of(j))
        return size_i * (size_i - 1) // 2 if i == j else size_i * size_j

    def panel(self, index: int) -> Block:
        """Read a panel, or take it from the cache, which holds at most ``cache_bytes``.

        Lengths and bounds are computed once and kept for every panel, 8 bytes a row.
        """
        if index in self._panels:
            self._panels.move_to_end(index)
            return self._panels[index]
        if index not in self._bounds:
            panel = load_block(self._read, self.panel_rows_of(index), self._device, self._scan_dtype)
            empty = panel.stored[:0]
            self._bounds[index] = dataclasses.replace(panel, stored=empty.clone(), scan=empty.clone())
        else:
            panel = reload_block(self._read, self._bounds[index], self._scan_dtype)
        self._panels[index] = panel
        room = max(2, self._cache_bytes // (panel.stored.nbytes + panel.scan.nbytes))
        while len(self._panels) > room:
            self._panels.popitem(last=False)
        return panel

    def load(self, rows: IntArray) -> Block:
        """Read some rows, int64 [M], ready to :meth:`search`; they are not cached."""
        return load_block(self._read, rows, self._device, self._scan_dtype)

    def search_tiles(
        self, tiles: Iterable[Tile], cutoff: float, pair_filter: PairFilter
    ) -> Iterator[tuple[Tile, Iterable[Edges]]]:
        """Search tiles one after another; on a GPU each is queued before the results of the one before it are read.

        Yields:
            Each tile, and what :meth:`search` yields for it.
        """
        if self._device.type != "cuda":
            yield from ((tile, self.search_tile(tile, cutoff, pair_filter)) for tile in tiles)
            return
        before: tuple[Tile, QueuedTile] | None = None
        for tile in tiles:
            queued = self._queue(*self._panels_of(tile), cutoff)
            if before is not None:
                yield before[0], self._read_queued(before[1], cutoff, pair_filter)
            before = tile, queued
        if before is not None:
            yield before[0], self._read_queued(before[1], cutoff, pair_filter)

    def search_tile(self, tile: Tile, cutoff: float, pair_filter: PairFilter) -> Iterator[Edges]:
        """Read the panels of a tile and :meth:`search` them."""
        yield from self.search(*self._panels_of(tile), cutoff, pair_filter)

    def _panels_of(self, tile: Tile) -> tuple[Block, Block]:
        panel_i = self.panel(tile[0])
        return panel_i, panel_i if tile[0] == tile[1] else self.panel(tile[1])

    def search(self, panel_i: Block, panel_j: Block, cutoff: float, pair_filter: PairFilter) -> Iterator[Edges]:
        """Find the pairs of one row of each panel that are within a distance.

        Args:
            panel_j: Another, or the same: then each pair is found once.
            cutoff: Largest distance, inclusive.
            pair_filter: Which pairs are worth computing.

        Yields:
            The pairs within the distance that pass the filter, with exact weights, a < b, in pieces of bounded size.
        """
        if self._device.type == "cuda":
            yield from self._read_queued(self._queue(panel_i, panel_j, cutoff), cutoff, pair_filter)
        else:
            yield from self._search_blocks(panel_i, panel_j, cutoff, pair_filter)

    def _queue(self, panel_i: Block, panel_j: Block, cutoff: float) -> QueuedTile:
        threshold = score_threshold(panel_i, panel_j, lowest_score(panel_i, panel_j, cutoff))
        return QueuedTile(panel_i, panel_j, float(threshold))

    def _read_queued(self, queued: QueuedTile, cutoff: float, pair_filter: PairFilter) -> Iterator[Edges]:
        """Yield what was found on a GPU; a tile with many near pairs is searched again in blocks."""
        edges = queued.pairs_within(cutoff)
        if edges is None:
            yield from self._search_blocks(queued.a, queued.b, cutoff, pair_filter)
        elif len(edges := edges[pair_filter(edges.a, edges.b, edges.weight)]):
            yield edges

    def _search_blocks(self, panel_i: Block, panel_j: Block, cutoff: float, pair_filter: PairFilter) -> Iterator[Edges]:
        """As :meth:`search`, block by block."""
        threshold = score_threshold(panel_i, panel_j, lowest_score(panel_i, panel_j, cutoff)).to(self._device)
        waiting: list[_CandidatePairs] = []
        num_waiting = 0
        with exact_accumulation(self._device):
            for start_j in range(0, len(panel_j), _BLOCK_ROWS):
                b = panel_j.scan[start_j : start_j + _BLOCK_ROWS]
                for start_i in range(0, len(panel_i), _BLOCK_ROWS):
                    if panel_i is panel_j and start_i > start_j:
                        break
                    a = panel_i.scan[start_i : start_i + _BLOCK_ROWS]
                    is_diagonal = panel_i is panel_j and start_i == start_j
                    for entries, candidates in _find_candidates(a, b, threshold, self._scores, is_diagonal):
                        found = candidates.shifted(start_i, start_j)
                        # Few candidates of many blocks are refined together; many of one at once, by matrix products.
                        if len(found) * _ENTRIES_PER_PAIR > entries:
                            yield from _refine_block(panel_i, panel_j, found, cutoff, pair_filter)
                        elif len(found):
                            waiting.append(found)
                            num_waiting += len(found)
                        if num_waiting > _MANY_PAIRS:
                            yield from _refine(panel_i, panel_j, waiting, cutoff, pair_filter)
                            waiting, num_waiting = [], 0
            if waiting:
                yield from _refine(panel_i, panel_j, waiting, cutoff, pair_filter)

    def panel_rows_of(self, index: int) -> IntArray:
        """Return the row numbers of a panel."""
        return self.rows[index * self.panel_rows : (index + 1) * self.panel_rows]


class GrownSearch(TiledSearch):
    """A search for the pairs that have a new row; old rows that fill its last panel are compared with all, too."""

    def __init__(
        self,
        read: ReadRows,
        new: IntArray,
        old: IntArray,
        device: torch.device,
        scan_dtype: torch.dtype,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        """Divide the work into tiles.

        Args:
            new: New rows, integers [M], each once.
            old: Old rows, likewise.
        """
        # No larger than the new rows fill.
        panel_rows = min(default_panel_rows(len(new) + len(old)), max(1, -(-len(new) // _BLOCK_ROWS)) * _BLOCK_ROWS)
        super().__init__(read, np.concatenate([new, old]), device, scan_dtype, panel_rows, cache_bytes)
        self._num_first = -(-len(new) // panel_rows)

    @property
    def name(self) -> str:
        """Identifies how the work is divided."""
        return f"{self.panel_rows}-grown"

    def tiles(self) -> Tiles:
        """Return the tiles (panel i, panel j), i ≤ j, whose panel i has new rows."""
        return GrownTiles(self._num_first, -(-len(self.rows) // self.panel_rows))

    @property
    def num_all_pairs(self) -> int:
        """Number of pairs that all tiles compare."""
        first = min(self._num_first * self.panel_rows, len(self.rows))
        return first * (first - 1) // 2 + first * (len(self.rows) - first)


@dataclasses.dataclass(frozen=True)
class _CandidatePairs:
    """Pairs that may be near enough.

    Attributes:
        i: Positions in one block, int64 [P].
        j: Positions in the other, int64 [P].
        score: Low-precision scores [P].
    """

    i: torch.Tensor
    j: torch.Tensor
    score: torch.Tensor

    def __len__(self) -> int:
        return len(self.score)

    def shifted(self, start_i: int, start_j: int) -> _CandidatePairs:
        return _CandidatePairs(self.i + start_i, self.j + start_j, self.score)


def _refine_block(
    a: Block, b: Block, found: _CandidatePairs, cutoff: float, pair_filter: PairFilter
) -> Iterator[Edges]:
    """As :func:`_refine`, for a part of the candidates of one block of each; near copies of one image fill matrices."""
    rows, row_P = occurring(found.i, len(a))
    columns, column_P = occurring(found.j, len(b))
    if len(rows) * len(columns) > _ENTRIES_PER_DENSE_PAIR * len(found):
        yield from _refine(a, b, [found], cutoff, pair_filter)
        return
    # Other entries are beyond the cut-off, or come with another part: a part may end inside a row.
    is_found_MN = torch.zeros(len(rows), len(columns), dtype=torch.bool, device=rows.device)
    is_found_MN[row_P, column_P] = True
    weight_MN = distance_matrix(a.stored[rows], b.stored[columns], a.squared[rows], b.squared[columns]).cpu().numpy()
    within_MN = (weight_MN <= np.float32(cutoff)) & is_found_MN.cpu().numpy()
    m_P, n_P = np.nonzero(within_MN)
    i_P, j_P = a.rows[rows.cpu().numpy()][m_P], b.rows[columns.cpu().numpy()][n_P]
    edges = Edges(np.minimum(i_P, j_P), np.maximum(i_P, j_P), weight_MN[within_MN])
    edges = edges[pair_filter(edges.a, edges.b, edges.weight)]
    if len(edges):
        yield edges


def _refine(
    a: Block, b: Block, candidates: list[_CandidatePairs], cutoff: float, pair_filter: PairFilter
) -> Iterator[Edges]:
    """Yield the candidates that are within the distance and pass the filter, with exact weights."""
    i_P, j_P, score_P = (torch.cat([getattr(each, name) for each in candidates]) for name in ("i", "j", "score"))
    use_P = _pass_filter(a, b, _CandidatePairs(i_P, j_P, score_P), pair_filter)
    i_P, j_P = i_P[use_P], j_P[use_P]
    if a.scan.dtype != torch.float32:
        near_P = _filter_in_float32(a, b, i_P, j_P, cutoff, pair_filter)
        i_P, j_P = i_P[near_P], j_P[near_P]
    if not len(i_P):
        return
    weight = selected_distances(a.stored, b.stored, a.squared, b.squared, i_P, j_P).cpu().numpy()
    within = weight <= np.float32(cutoff)
    if within.any():
        i, j = a.rows[i_P.cpu().numpy()[within]], b.rows[j_P.cpu().numpy()[within]]
        yield Edges(np.minimum(i, j), np.maximum(i, j), weight[within])


def _pass_filter(a: Block, b: Block, pairs: _CandidatePairs, pair_filter: PairFilter) -> torch.Tensor:
    """Tell which pairs pass the filter, bool [P], by the lower bounds that their scores give for their distances."""
    _, highest_P = score_bounds(a, b, pairs.score)
    squared_P = a.squared[pairs.i] + b.squared[pairs.j] - 2.0 * highest_P
    at_least_P = (squared_P.clamp(min=0.0).sqrt() * (1.0 - ROUNDING_MARGIN)).to(torch.float32)
    i, j = a.rows[pairs.i.cpu().numpy()], b.rows[pairs.j.cpu().numpy()]
    use = pair_filter(np.minimum(i, j), np.maximum(i, j), at_least_P.cpu().numpy())
    return torch.from_numpy(use).to(pairs.i.device)


def _filter_in_float32(
    a: Block, b: Block, i_P: torch.Tensor, j_P: torch.Tensor, cutoff: float, pair_filter: PairFilter
) -> torch.Tensor:
    """Tell which pairs a float32 product cannot rule out, bool [P]; all of them where they are too sparse for a product."""
    rows, row_P = occurring(i_P, len(a))
    columns, column_P = occurring(j_P, len(b))
    if len(rows) * len(columns) > _ENTRIES_PER_PAIR * len(i_P):
        return torch.ones(len(i_P), dtype=torch.bool, device=i_P.device)
    fine_a, fine_b = a.chosen(rows), b.chosen(columns)
    score_P = multiply(fine_a.scan, fine_b.scan)[row_P, column_P]
    near_P = score_P >= score_threshold(fine_a, fine_b, lowest_score(fine_a, fine_b, cutoff)).to(score_P.device)
    near_P[near_P.clone()] = _pass_filter(
        fine_a, fine_b, _CandidatePairs(row_P[near_P], column_P[near_P], score_P[near_P]), pair_filter
    )
    return near_P


def _find_candidates(
    a_MD: torch.Tensor, b_ND: torch.Tensor, threshold: torch.Tensor, buffer: torch.Tensor, is_diagonal: bool
) -> Iterator[tuple[int, _CandidatePairs]]:
    """Yield the pairs whose score is not below the threshold; of a block with itself, those with i < j.

    They come in parts of bounded size, each with the number of entries of the block that it stands for.
    """
    scores_MN = multiply(a_MD, b_ND, buffer)
    if is_diagonal:
        scores_MN.fill_diagonal_(-math.inf if scores_MN.is_floating_point() else torch.iinfo(scores_MN.dtype).min)
    # Positive floats order like the integers of their bits (negative ones lie below them), which CPUs compare faster. Most
    # stretches of a row have no hit, and their maximum shows it many times faster than a comparison of every entry.
    keys_MN, key = scores_MN, threshold
    if scores_MN.element_size() == 2 and float(threshold) > 0.0:
        keys_MN, key = scores_MN.view(torch.int16), threshold.view(torch.int16)
    stretch = _STRETCH if len(b_ND) % _STRETCH == 0 else len(b_ND)
    stretches_SW = keys_MN.view(-1, stretch)
    hit_S = torch.nonzero(stretches_SW.amax(dim=1) >= key)[:, 0]
    at_once = max(1, _STRETCHES_AT_ONCE * _STRETCH // stretch)
    for part_S in (hit_S[at : at + at_once] for at in range(0, len(hit_S), at_once)):
        p_P, within_P = torch.nonzero(stretches_SW[part_S] >= key, as_tuple=True)
        entry_P = part_S[p_P] * stretch + within_P
        i_P, j_P = entry_P // len(b_ND), entry_P % len(b_ND)
        if is_diagonal:
            above = i_P < j_P
            i_P, j_P = i_P[above], j_P[above]
        entries = scores_MN.numel() * len(part_S) // len(hit_S)
        yield entries, _CandidatePairs(i_P, j_P, scores_MN[i_P, j_P])
