"""Settings of a plan for GPUs that are not there."""

from __future__ import annotations

import dataclasses

from clipcid_cli.errors import UsageError
from clipcid_cli.runtime.devices import parse_devices
from clipcid_cli.steps.settings.shared import ABOVE_0, AT_LEAST_1, SharedSettings, flag_of, given_fields, group

_plan = group("A plan without a GPU, with --dry-run")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GpuPlanSettings(SharedSettings):
    """Settings of every step whose cost on GPUs can be computed."""

    gpus: str | None = _plan(
        None,
        "Compute what the step takes on such GPUs, for example 8xH100, in place of timing it here; `this` is the device at "
        "hand, which is measured.",
        metavar="NxGPU",
        operational=True,
    )
    images: int | None = _plan(
        None,
        "Number of images to plan for, such as 330M (k, M, G); by default those of the work directory or the data.",
        within=AT_LEAST_1,
        may_have_suffix=True,
        operational=True,
    )
    price: float | None = _plan(
        None, "Price of one GPU for an hour, in any currency.", within=ABOVE_0, operational=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gpus is not None:
            parse_devices(self.gpus)
            if not self.dry_run:
                raise UsageError(f"--gpus {self.gpus} plans a run, and --dry-run was not given.", "Add --dry-run.")
            return
        for field in given_fields(self):
            if field.name in ("images", "price"):
                raise UsageError(f"{flag_of(field)} was given, but no --gpus.", "Add --gpus, for example 8xH100.")
