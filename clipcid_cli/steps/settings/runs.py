"""Settings of `runs`."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from clipcid_cli.steps.settings.shared import SharedSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunsSettings(SharedSettings):
    """Settings of `runs`, which computes nothing and replaces its page each time."""

    omitted: ClassVar[tuple[str, ...]] = ("device", "precision", "batch_size", "workers", "seed", "overwrite")
