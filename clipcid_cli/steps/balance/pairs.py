"""All pairs of images within a distance, which linkages other than single need: the forest has only some of them.

A pair within a distance is within a component of single linkage at it, so only rows of one component are compared.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import numpy as np

from clipcid_cli.algorithms.near.edges import Edges
from clipcid_cli.algorithms.near.jobs import components, hash_arrays
from clipcid_cli.algorithms.sets.components import connected_components
from clipcid_cli.algorithms.sets.sinks import PairsWithin
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.arrays import Arrays
from clipcid_cli.runtime.timing import timed
from clipcid_cli.steps.balance.balance_run import BalanceRun
from clipcid_cli.steps.balance.groups import find_places, readable
from clipcid_cli.steps.balance.run_search import Search, run_search
from clipcid_cli.steps.balance.stored_forest import Forest

# Pairs that sets are made of, and the memory that each takes while they are sorted and covered by stars (measured).
_MAX_COLLECTED = 2**26
_BYTES_A_PAIR = 75


@dataclasses.dataclass(frozen=True)
class NotComputed:
    """The result of what was not computed; the reason completes the sentence "… is not computed: "."""

    reason: str


def find_pairs(
    run: BalanceRun, forest: Forest, searched_to: float, max_found: int, max_compared: int | None = None
) -> Edges | NotComputed:
    """Find all pairs of unique rows within a distance that a forest is complete to; the same on every process."""
    assert forest.has_all_to(searched_to, run.rows.num_searched), "components need all edges up to the distance"

    def find_members() -> Arrays:
        """Return the component of each row, and the unique rows that are not alone in theirs, by component."""
        unique, joined = run.rows.unique, forest.edges.up_to(searched_to)
        labels = connected_components(len(run.rows), joined.a, joined.b)
        label_U = labels[unique]
        members = unique[(np.bincount(label_U, minlength=1) > 1)[label_U]]
        return labels, members[np.argsort(labels[members], kind="stable")]

    labels, members = run.shared.publish(find_members)
    jobs = components(members, labels[members], run.rows_in_memory)
    if max_compared is not None and jobs.num_pairs > max_compared:
        return NotComputed(
            f"it takes {jobs.num_pairs:,} comparisons within the sets, more than the {max_compared:,} made for a report"
        )
    place_of = find_places(members)

    def further_identity() -> str:
        return f"{hash_arrays(labels[members])}-{max_found}"

    with readable(run.shared, run.rows.images, run.rows.numbers, members) as (source, places):
        search = Search(
            "pairs",
            jobs,
            lambda rows: source.take(places[place_of(rows)]),
            searched_to,
            partial(PairsWithin, labels, max_found),
            further_identity,
        )
        pairs = run_search(run, search)
    if len(pairs) > max_found:
        return NotComputed(f"more than {max_found:,} pairs are within the cut-off")
    return pairs


def collect_pairs(run: BalanceRun, forest: Forest, searched_to: float) -> Edges:
    """Return all pairs within a distance that a forest is complete to, ascending, or refuse what memory may not hold.

    Returns:
        Their rows by their positions in `run.rows.unique`; the same on every process.
    """
    with timed(run.seconds, "search"):
        pairs = find_pairs(run, forest, searched_to, _MAX_COLLECTED)
    if isinstance(pairs, NotComputed):
        raise ClipcidError(
            f"More than {_MAX_COLLECTED:,} pairs of images are within {searched_to:.4f} of each other. "
            f"--linkage {run.settings.linkage} holds all of them in memory, about {_BYTES_A_PAIR} bytes each: "
            f"over {_MAX_COLLECTED * _BYTES_A_PAIR / 2**30:.0f} GiB.",
            "Use --linkage single, or drop fewer images: a larger --keep or a smaller --threshold.",
        )
    return pairs.renumbered(run.rows.unique_positions())
