"""Settings of `cluster`."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from clipcid_cli.steps.settings.gpu_plan import GpuPlanSettings
from clipcid_cli.steps.settings.shared import AT_LEAST_1, BRIEF_SPINS, FRACTION, KeptSettings, group

_input = group("Inputs")
_clusters = group("Clusters")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClusterSettings(KeptSettings, GpuPlanSettings):
    """Settings of `cluster`."""

    # Candidates are decided in thousands of short sections: 100,000 rows took 11.5 s instead of 15 to 19 s on 2 cores.
    openmp_spins: ClassVar[str] = BRIEF_SPINS
    # No image is decoded, and the format of products changes no answer.
    omitted: ClassVar[tuple[str, ...]] = ("precision", "batch_size", "workers")

    max_bad_fraction: float = _input(
        0.01,
        "Fail when more than this share of the embeddings is not finite or missing from the keep list.",
        within=FRACTION,
        operational=True,
    )
    features: str = _clusters(
        "image",
        "Vectors to cluster: image embeddings, or with `joint` the normalized sum of image and caption embeddings.",
        choices=("image", "joint"),
    )
    num_clusters: int | None = _clusters(
        None,
        "Number of clusters; by default one per 225 images, at most 1,000,000, but for small data at least 256, or "
        "one per 8 images if fewer.",
        within=AT_LEAST_1,
    )
    iterations: int = _clusters(
        20, "Maximum number of Lloyd iterations; stops early if no image changes its cluster.", within=AT_LEAST_1
    )
    train_rows: int | None = _clusters(
        None,
        "Fit the centroids to a random sample of this many images, then assign all images to them. By default, fit to "
        "all.",
        within=AT_LEAST_1,
    )
