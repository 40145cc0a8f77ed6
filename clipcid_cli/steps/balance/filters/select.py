"""What is dropped before repeats are searched.

Each filter, and the cap of clusters after the search, is a mask over the rows of the keep list, the columns it adds to
that, and a summary for the JSON object.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.embeddings.folder import Embeddings
from clipcid_cli.formats.output import Output
from clipcid_cli.formats.results.keep_list import Column
from clipcid_cli.formats.sidecar import BalanceSidecar
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.steps.balance.filters.against import NearReferences, find_near
from clipcid_cli.steps.balance.filters.captions import CaptionWindow, find_captions
from clipcid_cli.steps.balance.filters.references import Reference
from clipcid_cli.steps.balance.rows import BalanceRows, BoolArray
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.balance import BalanceSettings


class Filter(Protocol):
    """What a filter found."""

    @property
    def reason(self) -> str:
        """What `dropped_by` says."""

    @property
    def is_dropped(self) -> BoolArray:
        """Which rows it drops, bool [N]."""

    def columns(self, folder: Path) -> list[Column]:
        """Return the columns of the keep list; in `folder` strings are mapped that may be more than memory holds."""

    def summarise(self) -> dict[str, Any]:
        """Return what the JSON object says."""


def apply_filters(
    settings: BalanceSettings,
    machine: Machine,
    output: Output[BalanceSidecar],
    embeddings: Embeddings,
    rows: BalanceRows,
    references: list[Reference],
    reporter: Reporter,
) -> tuple[BalanceRows, NearReferences | None, CaptionWindow | None]:
    """Find the rows to search; the same on every process.

    Args:
        rows: All finite rows.

    Returns:
        The rows, and what was found of references and of captions, where they were asked for.
    """
    near = window = None
    passes = np.ones(len(rows), np.bool_)
    if references:
        near = find_near(settings, machine, output, rows, references, reporter)
        passes &= ~near.is_dropped
        number = np.count_nonzero(near.is_dropped)
        reporter.note(f"{number:,} of {len(rows):,} images are within {near.threshold:g} of a reference.")
    if settings.has_window:
        window = find_captions(settings, machine, output.work, embeddings, rows, reporter)
        passes &= ~window.is_dropped
        number = np.count_nonzero(~window.is_dropped)
        reporter.note(f"{number:,} of {len(rows):,} images have a caption similarity {window.describe()}.")
    if not passes.any():
        raise ClipcidError(
            f"All {len(rows):,} images are dropped before repeats are searched.",
            "Give a smaller --against-threshold, or a wider window of caption similarity.",
        )
    if settings.has_filters:
        rows = rows.restrict(machine, output.work, passes)
    return rows, near, window
