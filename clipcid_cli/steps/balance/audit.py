"""What a search in partitions left: how many kept images still have another kept image within the cut-off."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from clipcid_cli.algorithms.metrics.intervals import clopper_pearson
from clipcid_cli.algorithms.search.blocks import load_block
from clipcid_cli.algorithms.search.distances import FloatArray, IntArray
from clipcid_cli.algorithms.search.pair_search import TiledSearch
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.runtime.precision import Precision
from clipcid_cli.steps.balance.search import Survey
from clipcid_cli.steps.reporting import Reporter

# None among so many bounds the rate at 1.3e-4.
SAMPLE = 30_000
_PANEL_ROWS = 8192


@dataclasses.dataclass(frozen=True)
class Audit:
    """The outcome.

    Attributes:
        sampled: Kept images looked at, drawn at random.
        kept: Kept images each was compared with.
        near: How many of the sampled have another kept image within the cut-off.
        low: Lower end of the 95 % interval of that rate among all kept images.
        high: Upper end; both are the rate itself when all were looked at.
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
    machine: Machine, survey: Survey, kept: IntArray, cutoff: float, scan: Precision, reporter: Reporter
) -> Audit:
    """Compare a random sample of the kept images with all kept ones, exactly; the same on every process.

    Args:
        kept: Rows that are kept, int64 [M], ascending, M ≥ 1.
        cutoff: The distance, inclusive.
        scan: Format in which near pairs are looked for.
    """
    sample = np.sort(np.random.default_rng(0).permutation(kept)[:SAMPLE])
    found = np.zeros(len(sample), np.bool_)

    def place(rows: IntArray) -> IntArray:
        """Return where rows lie in the sample; its length for others, whose place counts as found already."""
        at = np.searchsorted(sample, rows)
        return np.where(sample[np.minimum(at, len(sample) - 1)] == rows, at, len(sample))

    def wanted(a: IntArray, b: IntArray, _: FloatArray) -> npt.NDArray[np.bool_]:
        known = np.append(found, True)
        return np.asarray((a != b) & ~(known[place(a)] & known[place(b)]))

    join = TiledSearch(survey.read, kept, machine.device, scan.dtype)
    blocks = [
        load_block(survey.read, sample[at : at + _PANEL_ROWS], machine.device, scan.dtype)
        for at in range(0, len(sample), _PANEL_ROWS)
    ]
    starts = range(machine.rank * _PANEL_ROWS, len(kept), machine.size * _PANEL_ROWS)
    with reporter.progress("audit", sum(min(_PANEL_ROWS, len(kept) - at) for at in starts), "images") as progress:
        for at in starts:
            panel = load_block(survey.read, kept[at : at + _PANEL_ROWS], machine.device, scan.dtype)
            for block in blocks:
                for edges in join.search(block, panel, cutoff, wanted):
                    place_P = np.concatenate([place(edges.a), place(edges.b)])
                    found[place_P[place_P < len(sample)]] = True
            progress.advance(len(panel))
    near = int(np.count_nonzero(np.any(machine.gather(found), axis=0)))
    if len(sample) == len(kept):
        return Audit(len(sample), len(kept), near, near / len(kept), near / len(kept))
    return Audit(len(sample), len(kept), near, *clopper_pearson(near, len(sample)))
