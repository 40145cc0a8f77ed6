"""The filters of a run, one after another."""

from __future__ import annotations

import dataclasses

import numpy as np

from clipcid_cli.algorithms.near.exact import BoolArray
from clipcid_cli.errors import ClipcidError
from clipcid_cli.steps import reporting
from clipcid_cli.steps.balance.balance_run import BalanceRun
from clipcid_cli.steps.balance.filters.filter import Dropped


def filter_rows(run: BalanceRun) -> tuple[BalanceRun, list[Dropped]]:
    """Apply the filters that come before the search, leave out of it what they drop, and warn of what may go wrong."""
    dropped: list[Dropped] = []
    is_left = np.ones(len(run.rows), np.bool_)
    for rule in run.filters:
        if rule.follows_search:
            continue
        dropped.append(rule.apply(run, is_left))
        is_left = is_left & ~dropped[-1].is_dropped
        if not is_left.any():
            raise ClipcidError(
                f"All {len(is_left):,} images are dropped before repeats are searched.",
                "Give a smaller --against-threshold, or a wider window of caption similarity.",
            )
        run = dataclasses.replace(run, rows=run.rows.restrict(run.shared, is_left))
    for rule in run.filters:
        if risk := rule.find_risk(run.rows.num_searched):
            reporting.warn(risk)
    return run, dropped


def filter_kept(run: BalanceRun, is_kept: BoolArray) -> tuple[list[Dropped], BoolArray]:
    """Apply the filters that come after the search to the images that repeats have left, bool [N]; return which stay."""
    dropped: list[Dropped] = []
    for rule in run.filters:
        if rule.follows_search:
            dropped.append(rule.apply(run, is_kept))
            is_kept = is_kept & ~dropped[-1].is_dropped
    return dropped, is_kept
