"""What was measured of the sets where that took long, so that a killed run need not read the rows again."""

from __future__ import annotations

from clipcid_cli.algorithms.near.jobs import hash_arrays
from clipcid_cli.formats.arrays import Arrays, array_journal
from clipcid_cli.formats.fingerprint import hash_json
from clipcid_cli.steps.balance.balance_run import BalanceRun
from clipcid_cli.steps.balance.sets import MEASURED, Division


def load_measured(run: BalanceRun, division: Division) -> Arrays:
    """Load what was saved of these sets; nothing where there is none."""
    saved = array_journal(run.work / MEASURED).read(_name(run, division))
    return () if saved is None else tuple(saved[str(place)] for place in range(len(saved)))


def save_measured(run: BalanceRun, division: Division, arrays: Arrays) -> None:
    """Save what was measured."""
    named = {str(place): array for place, array in enumerate(arrays)}
    array_journal(run.work / MEASURED).append(_name(run, division), named)


def _name(run: BalanceRun, division: Division) -> str:
    """Hash what decides the sets and what is measured of them: unfinished work may be of other settings."""
    decisive = (division.labels, division.representatives, run.rows.is_searched)
    hashes = [None if array is None else hash_arrays(array) for array in decisive]
    return hash_json([run.inputs_hash, run.settings.select, *hashes])
