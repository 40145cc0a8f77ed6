"""Settings of `doctor`."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from clipcid_cli.runtime.devices import parse_devices
from clipcid_cli.steps.settings.shared import ReadingSettings, group

_look = group("What is looked at")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoctorSettings(ReadingSettings):
    """Settings of `doctor`, which leaves no file behind."""

    omitted: ClassVar[tuple[str, ...]] = (
        *("batch_size", "seed", "overwrite", "dry_run", "keys", "key_column", "max_bad_fraction"),
        *("caption_column", "caption_key", "caption_lines"),
    )

    data: str | None = _look(
        None,
        "Images whose disk and decoding are measured, in any form that `embed` takes. Without it, images are made up and "
        "no disk of data is looked at.",
        metavar="DATA",
        operational=True,
    )
    gpus: str | None = _look(
        None,
        "Compare with what such GPUs need, for example 8xH100; by default with the needs of this machine's own devices.",
        metavar="NxGPU",
        operational=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gpus is not None:
            parse_devices(self.gpus)
