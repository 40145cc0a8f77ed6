"""Settings of `verify`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import ClassVar

from clipcid_cli.steps.settings.shared import TrustSettings, argument, group

_check = group("Verification")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifySettings(TrustSettings):
    """Settings of `verify`."""

    writes_work: ClassVar[bool] = False
    omitted: ClassVar[tuple[str, ...]] = (
        *("trust_work", "device", "precision", "batch_size", "workers", "seed", "overwrite", "dry_run"),
    )

    folder: Path | None = argument(
        None, "Work directory, or the folder of one output. By default, the work directory (--work)."
    )
    read_data: bool = _check(
        False,
        "Also read the data that embeddings were made from: each shard, and its copy in the cache, is compared with what "
        "was recorded, and the bytes of each sample are read.",
        operational=True,
    )
