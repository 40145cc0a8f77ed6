"""An estimate of what a search in partitions missed: kept images with another kept image within the cut-off."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from clipcid_cli.algorithms.metrics.intervals import clopper_pearson
from clipcid_cli.algorithms.near.exact import FloatArray, IntArray
from clipcid_cli.algorithms.near.search import near_pairs
from clipcid_cli.algorithms.near.tiles import TiledSearch
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.runtime.precision import Precision
from clipcid_cli.steps.balance.rows import BalanceRows
from clipcid_cli.steps.reporting import Reporter

# If none of this many has another, the rate is at most 1.3e-4 (95 %).
SAMPLE = 30_000
_PANEL_ROWS = 8192


@dataclasses.dataclass(frozen=True)
class Audit:
    """The outcome.

    Attributes:
        sampled: Kept images in the random sample.
        kept: Kept images that each was compared with.
        near: Sampled images that have another kept image within the cut-off.
        low: Lower end of the 95 % interval of that rate among all kept images.
        high: Upper end; both are the rate itself when the sample holds all kept images.
    """

    sampled: int
    kept: int
    near: int
    low: float
    high: float

    @property
    def rate(self) -> float:
        """Share of the sampled images that have another within the cut-off."""
        return self.near / self.sampled


def audit_kept(
    machine: Machine, rows: BalanceRows, kept: IntArray, cutoff: float, scan: Precision, reporter: Reporter
) -> Audit:
    """Compare a random sample of the kept images with all kept ones, exactly; the same on every process.

    Args:
        kept: Rows that are kept, integers [M], ascending, M ≥ 1.
        cutoff: The distance, inclusive.
        scan: Format of the fast product.
    """
    sample = np.sort(np.random.default_rng(0).permutation(kept)[:SAMPLE])
    found = np.zeros(len(sample), np.bool_)

    def position(numbers: IntArray) -> IntArray:
        """Return the positions of rows in the sample; its length for others."""
        at = np.searchsorted(sample, numbers)
        return np.where(sample[np.minimum(at, len(sample) - 1)] == numbers, at, len(sample))

    def may_count(a: IntArray, b: IntArray, _: FloatArray) -> npt.NDArray[np.bool_]:
        """Tell which pairs have a sampled row that has no near one yet."""
        settled = np.append(found, True)
        return np.asarray((a != b) & ~(settled[position(a)] & settled[position(b)]))

    search = TiledSearch(rows.read, kept, machine.device, scan.dtype)
    blocks = [search.load(sample[at : at + _PANEL_ROWS]) for at in range(0, len(sample), _PANEL_ROWS)]
    starts = range(machine.rank * _PANEL_ROWS, len(kept), machine.size * _PANEL_ROWS)
    with reporter.progress("audit", sum(min(_PANEL_ROWS, len(kept) - at) for at in starts), "images") as progress:
        for at in starts:
            panel = search.load(kept[at : at + _PANEL_ROWS])
            for block in blocks:
                for edges in near_pairs(block, panel, cutoff, may_count):
                    position_P = np.concatenate([position(edges.a), position(edges.b)])
                    found[position_P[position_P < len(sample)]] = True
            progress.advance(len(panel))
    near = int(np.count_nonzero(np.any(machine.gather(found), axis=0)))
    if len(sample) == len(kept):
        return Audit(len(sample), len(kept), near, near / len(kept), near / len(kept))
    return Audit(len(sample), len(kept), near, *clopper_pearson(near, len(sample)))
