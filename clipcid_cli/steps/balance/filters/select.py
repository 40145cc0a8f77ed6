"""Which images are dropped before repeats are searched."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clipcid_cli.algorithms.near.edges import Edges, sort_edges
from clipcid_cli.algorithms.near.exact import row_type
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.arrays import Arrays
from clipcid_cli.formats.embeddings.folder import Embeddings
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.steps.balance.filters.against import NearReferences, find_near
from clipcid_cli.steps.balance.filters.captions import CaptionWindow, measure_captions
from clipcid_cli.steps.balance.filters.references import Reference
from clipcid_cli.steps.balance.rows import BalanceRows
from clipcid_cli.steps.chunks import SearchRun
from clipcid_cli.steps.settings.balance import BalanceSettings
from clipcid_cli.steps.shared_arrays import share_arrays


@dataclasses.dataclass(frozen=True)
class Filters:
    """What was dropped before repeats are searched.

    Attributes:
        everything: All finite rows: those of the keep list.
        rows: Those that are balanced.
        near: Which rows lie near a reference, and are dropped for it; None without references.
        captions: The window that the others lie outside of; None without one.
    """

    everything: BalanceRows
    rows: BalanceRows
    near: NearReferences | None
    captions: CaptionWindow | None

    def summarise(self) -> dict[str, Any]:
        """Return the fields of the JSON object: null for filters that were not asked for."""
        return {
            "against": None if self.near is None else self.near.summarise(),
            "caption_window": None if self.captions is None else self.captions.summarise(),
        }


def apply_filters(
    settings: BalanceSettings,
    run: SearchRun,
    folder: Path,
    embeddings: Embeddings,
    rows: BalanceRows,
    references: list[Reference],
) -> Filters:
    """Find the rows to balance; the same on every process.

    Args:
        folder: The folder of `balance`.
        rows: All finite rows.
    """
    machine, reporter = run.machine, run.reporter
    if not settings.has_filters:
        return Filters(rows, rows, None, None)
    near = window = None
    passes = np.ones(len(rows), np.bool_)
    if references:
        assert settings.reference_distance is not None  # the settings have checked it
        near = find_near(run, folder, rows, references, settings.reference_distance)
        passes &= near.is_far
        reporter.note(
            f"{np.count_nonzero(~near.is_far):,} of {len(rows):,} images are within {near.threshold:g} of a reference."
        )
    if settings.has_window:
        window = measure_captions(settings, machine, run.work, embeddings, rows, reporter)
        passes &= window.is_inside
        number = np.count_nonzero(window.is_inside)
        reporter.note(f"{number:,} of {len(rows):,} images have a caption similarity {window.describe()}.")
    if not passes.any():
        raise ClipcidError(
            f"All {len(rows):,} images are dropped before repeats are searched.",
            "Give a smaller --against-threshold, or a wider window of caption similarity.",
        )
    return Filters(rows, share_chosen(machine, run.work, rows, passes), near, window)


def share_chosen(machine: Machine, folder: Path, rows: BalanceRows, which: npt.NDArray[np.bool_]) -> BalanceRows:
    """Return the chosen rows, bool [N], with the copies among them; the same on every process.

    Args:
        folder: Where processes share them.
        rows: All finite rows.
    """

    def choose() -> Arrays:
        kind = row_type(len(rows))
        positions = np.flatnonzero(which).astype(kind)
        place, original = np.arange(len(positions), dtype=kind), np.arange(len(rows), dtype=kind)
        original[rows.copies.b] = rows.copies.a
        original = original[positions]
        # Written in reverse, the first of equal rows remains.
        first = np.zeros(len(rows), kind)
        first[original[::-1]] = place[::-1]
        first = first[original]
        copies = place[first != place]
        return positions, rows.numbers[positions], place[first == place], first[copies], copies

    positions, numbers, unique, a, b = share_arrays(machine, folder, choose)
    copies = sort_edges(Edges(a, b, np.zeros(len(b), np.float32)))
    return BalanceRows(rows.images, numbers, unique, copies, positions, len(rows))
