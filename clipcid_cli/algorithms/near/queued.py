"""The near pairs of a tile on a GPU: everything is queued there at once, and read when it is done, by one wait of the host.

Sizes of results that the host must know to go on would make it wait several times a tile. So a fixed number of the largest
scores is taken, their pairs are computed exactly, and the host picks those within the distance. Where more scores than that
reach the threshold the tile is *crowded*, and must be searched in another way.

Shape letters: M and N rows of two blocks, S stretches of a row of scores, s scores of a stretch, P pairs.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from clipcid_cli.algorithms.near.blocks import Block, exact_accumulation, multiply
from clipcid_cli.algorithms.near.distances import paired_distances
from clipcid_cli.algorithms.near.edges import Edges

# Scores whose maximum is taken at once.
_STRETCH = 128
# Pairs that are computed for each tile, and stretches that are looked into.
_MOST_PAIRS = 16_384


class QueuedTile:
    """The comparison of two blocks of rows, queued on their device.

    Args:
        a: One block.
        b: Another, or the same.
        threshold: Smallest score of pairs that may be near enough, see `score_threshold`.
    """

    def __init__(self, a: Block, b: Block, threshold: float) -> None:
        self.a, self.b = a, b
        device = a.scan.device
        # Rows of zeros make whole stretches of the scores. Their scores are 0, and so are those of each pair's second place:
        # where even 0 reaches the threshold the tile is crowded, or all of its pairs are computed.
        padding = -len(b) % _STRETCH
        self._width = len(b) + padding
        with exact_accumulation(device):
            score_MN = multiply(a.scan, F.pad(b.scan, (0, 0, 0, padding)) if padding else b.scan)
        if a is b:
            score_MN.triu_(1)
        stretch_Ss = score_MN.view(-1, _STRETCH)
        largest_S, place_S = _top(stretch_Ss.amax(dim=1))
        score_P, place_P = _top(stretch_Ss[place_S].view(-1))
        entry_P = torch.add(place_P % _STRETCH, place_S[place_P // _STRETCH], alpha=_STRETCH)
        i_P, j_P = entry_P // self._width, entry_P % self._width
        if padding:
            j_P.clamp_(max=len(b) - 1)
        distance_P = paired_distances(a.stored[i_P], b.stored[j_P], a.squared[i_P], b.squared[j_P])
        is_crowded = torch.maximum(largest_S.amin(), score_P.amin()) >= threshold
        # Both are exact in float64: one copy to the host's pinned memory, which does not wait.
        results = torch.cat([entry_P.double(), distance_P.double(), is_crowded.double()[None]])
        self._results = results.to("cpu", non_blocking=True)
        self._done = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]  # PyTorch's
        if self._done is not None:
            self._done.record()

    def pairs_within(self, cutoff: float) -> Edges | None:
        """Wait for the results: the pairs within a distance, with exact weights; None where the tile is crowded."""
        if self._done is not None:
            self._done.synchronize()
        results = self._results.numpy()
        if results[-1]:
            return None
        entry_P, weight_P = np.split(results[:-1], 2)
        near_P = weight_P <= np.float32(cutoff)
        i_P, j_P = np.divmod(entry_P[near_P].astype(np.int64), self._width)
        once_P = j_P < len(self.b)
        if self.a is self.b:
            once_P &= i_P < j_P
        i_P, j_P = self.a.rows[i_P[once_P]], self.b.rows[j_P[once_P]]
        weight_P = weight_P[near_P][once_P].astype(np.float32)
        return Edges(np.minimum(i_P, j_P), np.maximum(i_P, j_P), weight_P)


def _top(score_S: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the largest scores, in any order, and their places."""
    values, places = score_S.topk(min(_MOST_PAIRS, len(score_S)), sorted=False)
    return values, places
