"""What all parts of one `balance` share once its rows are known."""

from __future__ import annotations

import dataclasses
import time
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from clipcid_cli.formats.embeddings.folder import Embeddings
from clipcid_cli.formats.fingerprint import identity_of
from clipcid_cli.formats.output import Output
from clipcid_cli.formats.sidecar import BalanceSidecar
from clipcid_cli.formats.skips import Skips
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.runtime.precision import Precision
from clipcid_cli.steps.balance.rows import BalanceRows
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.balance import BalanceSettings

if TYPE_CHECKING:
    from clipcid_cli.steps.balance.filters.against import NearReferences
    from clipcid_cli.steps.balance.filters.captions import CaptionWindow

# Limit on a CPU of the panels kept in memory, in the format of the fast product and as stored.
CACHE_BYTES = 2**30
# Memory that plans rely on for panels, as stored in float16 and as copies of at most float32. It is a property of the device
# alone: what is free differs from run to run, and plans must not.
_PLANNED_BYTES = {"cpu": CACHE_BYTES, "cuda": 2**32}
_BYTES_AN_ENTRY = 2 + 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class BalanceRun:
    """One run.

    Attributes:
        rows: The rows of the keep list.
        skips: Rows that are not finite.
        scan: The format of the fast product.
        near: What lies near references; None without any.
        captions: What the window of caption similarity holds; None without one.
        began: When its output was begun, by `time.perf_counter`.
        seconds: Time by phase, but for that of writing.
    """

    settings: BalanceSettings
    embeddings: Embeddings
    output: Output[BalanceSidecar]
    machine: Machine
    reporter: Reporter
    rows: BalanceRows
    skips: Skips
    scan: Precision
    near: NearReferences | None = None
    captions: CaptionWindow | None = None
    began: float
    seconds: dict[str, float]

    @property
    def work(self) -> Path:
        """The folder of unfinished work, which all processes reach."""
        return self.output.work

    @cached_property
    def inputs(self) -> str:
        """Identifies the rows, whatever is chosen of them."""
        return identity_of({}, self.output.run.inputs)

    @property
    def rows_in_memory(self) -> int:
        """How many rows plans can rely on to fit into the memory for panels."""
        return _PLANNED_BYTES[self.machine.device.type] // (self.embeddings.width * _BYTES_AN_ENTRY)

    def phases(self) -> dict[str, float]:
        """Return the time by phase until now: what is neither searched nor audited is written."""
        other = self.seconds["search"] + self.seconds.get("audit", 0.0)
        phases = self.seconds | {"write": time.perf_counter() - self.began - other}
        return {phase: round(value, 3) for phase, value in phases.items()}
