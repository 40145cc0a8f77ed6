"""All pairs within a distance, searched within the components of a forest: a star cover needs them beside the forest."""

from __future__ import annotations

import dataclasses

import numpy as np

from clipcid_cli.algorithms.near.edges import Edges
from clipcid_cli.algorithms.near.exact import IntArray
from clipcid_cli.algorithms.near.plan import Plan, components, hash_arrays
from clipcid_cli.algorithms.sets.sinks import PairsWithin
from clipcid_cli.errors import ClipcidError
from clipcid_cli.steps.balance.balance_run import BalanceRun
from clipcid_cli.steps.balance.chunks import Search, run_chunks
from clipcid_cli.steps.balance.shared_arrays import share_arrays

# Limits of `collect_few_pairs`, some seconds on two cores: rows compared, and pairs found (20 bytes each, and several times
# that to sort and cover them).
_MAX_COMPARED = 2**31
_MAX_FOUND = 2**23
# Limit of `collect_pairs`, and the memory a pair takes while pairs are sorted and covered (measured).
_MAX_COLLECTED = 2**26
_BYTES_A_PAIR = 75


@dataclasses.dataclass(frozen=True)
class NotComputed:
    """The result of what was not computed.

    Attributes:
        reason: Completes the sentence "… is not computed: ".
    """

    reason: str


def collect_pairs(run: BalanceRun, labels: IntArray, cutoff: float) -> Edges:
    """Find all pairs of unique rows within a distance, given the components at it; the same on every process.

    Args:
        labels: Component of each row at the distance, integers [N]; only pairs within one are compared.
        cutoff: The distance, inclusive.
    """
    found = _search(run, _plan(run, labels), labels, cutoff, _MAX_COLLECTED)
    if len(found) > _MAX_COLLECTED:
        raise ClipcidError(
            f"More than {_MAX_COLLECTED:,} pairs of images are within {cutoff:.4f} of each other. A star cover holds all "
            f"of them in memory, about {_BYTES_A_PAIR} bytes each: "
            f"over {_MAX_COLLECTED * _BYTES_A_PAIR / 2**30:.0f} GiB.",
            "Use --linkage single, or drop fewer images: a larger --keep or a smaller --threshold.",
        )
    return found


def collect_few_pairs(run: BalanceRun, labels: IntArray, cutoff: float) -> Edges | NotComputed:
    """Find the pairs that :func:`collect_pairs` finds, unless that would take long."""
    plan = _plan(run, labels)
    if plan.num_pairs > _MAX_COMPARED:
        return NotComputed(
            f"it takes {plan.num_pairs:,} comparisons within the groups, more than the {_MAX_COMPARED:,} made for a report"
        )
    found = _search(run, plan, labels, cutoff, _MAX_FOUND)
    if len(found) > _MAX_FOUND:
        return NotComputed(f"more than {_MAX_FOUND:,} pairs are within the cut-off")
    return found


def _plan(run: BalanceRun, labels: IntArray) -> Plan:
    """Plan the comparison of the unique rows that are not alone in their component."""

    def find_members() -> tuple[IntArray]:
        unique = run.rows.unique
        label_U = labels[unique]
        members = unique[(np.bincount(label_U, minlength=1) > 1)[label_U]]
        return (members[np.argsort(labels[members], kind="stable")],)

    (members,) = share_arrays(run.machine, run.work, find_members)
    return components(members, labels[members], run.rows_in_memory)


def _search(run: BalanceRun, plan: Plan, labels: IntArray, cutoff: float, most: int) -> Edges:
    """Find the pairs of one component; where they are more than `most`, some more than those."""
    of = f"{hash_arrays(labels[plan.rows])}-{most}"
    return run_chunks(run, Search("pairs", plan, run.rows.read, cutoff, lambda: PairsWithin(labels, most), of))
