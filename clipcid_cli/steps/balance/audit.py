"""An estimate of what a search in partitions missed: kept images with another kept image within the cut-off."""

from __future__ import annotations

import numpy as np

from clipcid_cli.algorithms.metrics.intervals import clopper_pearson
from clipcid_cli.algorithms.near.exact import IntArray
from clipcid_cli.algorithms.near.plan import rectangle
from clipcid_cli.algorithms.sets.sinks import NearestOf
from clipcid_cli.steps.balance.result import Audit
from clipcid_cli.steps.balance.rows import BalanceRows
from clipcid_cli.steps.chunks import SearchRun, run_chunks

# If none of this many has another, the rate is at most 1.3e-4 (95 %).
SAMPLE = 30_000


def audit_kept(run: SearchRun, rows: BalanceRows, kept: IntArray, cutoff: float) -> Audit:
    """Compare a random sample of the kept images with all kept ones, exactly; the same on every process.

    Args:
        kept: Rows that are kept, integers [M], ascending, M ≥ 1.
        cutoff: The distance, inclusive.
    """
    sample = np.sort(np.random.default_rng(0).permutation(kept)[:SAMPLE])
    plan = rectangle(sample, kept, run.rows_in_memory)
    found = run_chunks(run, plan, rows.read, cutoff, lambda: NearestOf(sample), "audit")
    near = int(np.count_nonzero(np.isin(sample, np.concatenate([found.a, found.b]))))
    rate = near / len(sample)
    low, high = (rate, rate) if len(sample) == len(kept) else clopper_pearson(near, len(sample))
    return Audit(len(sample), len(kept), near, low, high, rate)
