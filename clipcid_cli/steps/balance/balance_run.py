"""What all parts of one `balance` share once it has begun."""

from __future__ import annotations

import dataclasses
import time
from functools import cached_property
from pathlib import Path

from clipcid_cli.formats.fingerprint import identity_of
from clipcid_cli.formats.output import Output
from clipcid_cli.formats.results.keep_list import BalanceSidecar
from clipcid_cli.formats.skips import Skips
from clipcid_cli.runtime.distributed import DistContext
from clipcid_cli.runtime.precision import Precision
from clipcid_cli.steps.balance.plan import BalancePlan
from clipcid_cli.steps.balance.rows import BalanceRows
from clipcid_cli.steps.balance.shared_arrays import SharedArrays

# Limit on a CPU of the panels kept in memory, in the format of the fast product and as stored.
CACHE_BYTES = 2**30
# Memory that plans rely on for panels, as stored in float16 and as copies of at most float32. It is a property of the device
# alone: what is free differs from run to run, and plans must not.
_PLANNED_BYTES = {"cpu": CACHE_BYTES, "cuda": 2**32}
_BYTES_AN_ENTRY = 2 + 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class BalanceRun(BalancePlan):
    """A plan that is being computed, on each process."""

    context: DistContext
    output: Output[BalanceSidecar]
    shared: SharedArrays
    rows: BalanceRows
    skips: Skips  # rows that are not finite
    scan: Precision  # the format of the fast product
    # When its output was begun, by `time.perf_counter`.
    began: float

    @property
    def work(self) -> Path:
        """The folder of unfinished work, which all processes reach."""
        return self.output.work

    @cached_property
    def inputs_hash(self) -> str:
        """A hash of the files of embeddings, whatever is chosen of their rows."""
        return identity_of({}, self.output.spec.inputs)

    @property
    def num_requested(self) -> int:
        """How many of the searched images are to be kept: all where a cut-off is given in place of a share."""
        # Python rounds a half to the even number.
        keep, num_searched = self.settings.keep, self.rows.num_searched
        return num_searched if keep is None else max(1, round(keep * num_searched))

    @property
    def rows_in_memory(self) -> int:
        """How many rows plans can rely on to fit into the memory for panels."""
        return _PLANNED_BYTES[self.context.device.type] // (self.embeddings.width * _BYTES_AN_ENTRY)

    def phases(self) -> dict[str, float]:
        """Return the time by phase until now: what is neither searched nor audited is written."""
        other = self.seconds["search"] + self.seconds.get("audit", 0.0)
        phases = self.seconds | {"write": time.perf_counter() - self.began - other}
        return {phase: round(value, 3) for phase, value in phases.items()}
