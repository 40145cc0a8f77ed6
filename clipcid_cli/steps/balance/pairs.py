"""All pairs of images within a cut-off, which stars are made of: they lie within the components of single linkage."""

from __future__ import annotations

import dataclasses

import numpy as np

from clipcid_cli.algorithms.near.edges import Edges
from clipcid_cli.algorithms.near.exact import IntArray
from clipcid_cli.algorithms.near.plan import components, hash_arrays
from clipcid_cli.algorithms.sets.sinks import PairsWithin
from clipcid_cli.steps.balance.balance_run import BalanceRun
from clipcid_cli.steps.balance.groups import find_places, readable
from clipcid_cli.steps.balance.search import Search, run_chunks


@dataclasses.dataclass(frozen=True)
class NotComputed:
    """The result of what was not computed; the reason completes the sentence "… is not computed: "."""

    reason: str


def find_pairs(
    run: BalanceRun, labels: IntArray, cutoff: float, max_found: int, max_compared: int | None = None
) -> Edges | NotComputed:
    """Find all pairs of unique rows within a distance, given the component of each row at it; the same on every process."""

    def find_members() -> tuple[IntArray]:
        """Return the unique rows that are not alone in their component, by component."""
        unique = run.rows.unique
        label_U = labels[unique]
        members = unique[(np.bincount(label_U, minlength=1) > 1)[label_U]]
        return (members[np.argsort(labels[members], kind="stable")],)

    (members,) = run.shared.publish(find_members)
    plan = components(members, labels[members], run.rows_in_memory)
    if max_compared is not None and plan.num_pairs > max_compared:
        return NotComputed(
            f"it takes {plan.num_pairs:,} comparisons within the sets, more than the {max_compared:,} made for a report"
        )
    place_of = find_places(members)

    def beside() -> str:
        return f"{hash_arrays(labels[members])}-{max_found}"

    with readable(run.shared, run.rows.images, run.rows.numbers, members) as read:
        search = Search(
            "pairs",
            plan,
            lambda rows: read(place_of(rows)),
            cutoff,
            lambda: PairsWithin(labels, max_found),
            beside,
        )
        pairs = run_chunks(run, search)
    if len(pairs) > max_found:
        return NotComputed(f"more than {max_found:,} pairs are within the cut-off")
    return pairs
