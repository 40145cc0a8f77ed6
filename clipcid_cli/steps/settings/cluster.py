"""Settings of `cluster`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import ClassVar

from clipcid_cli.steps.settings.fields import option
from clipcid_cli.steps.settings.shared import BRIEF_SPINS, KeyedSettings, npz_array_option

_INPUTS = "Inputs"
_CLUSTERS = "Clusters"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClusterSettings(KeyedSettings):
    """Settings of `cluster`."""

    # Candidates are decided in thousands of short sections: 100,000 rows took 11.5 s instead of 15 to 19 s on 2 cores.
    openmp_spins: ClassVar[str] = BRIEF_SPINS

    embeddings: Path | None = option(
        None,
        "Folder of embeddings in clip-retrieval's layout; by default those in the work directory.",
        group=_INPUTS,
        operational=True,
    )
    npz_array: str | None = npz_array_option(_INPUTS)
    keep_list: str | None = option(
        None,
        "Keep list of `clipcid balance`: cluster only its kept images, or all with `none`. By default, the work directory's "
        "if there is one.",
        group=_INPUTS,
        metavar="FILE",
        operational=True,
    )
    features: str = option(
        "image",
        "Vectors to cluster: image embeddings, or with `joint` the normalized sum of image and caption embeddings.",
        group=_CLUSTERS,
        choices=("image", "joint"),
    )
    num_clusters: int | None = option(
        None,
        "Number of clusters; by default one per 225 images, at most 1,000,000, but on small data at least 256 or one per "
        "8 images.",
        group=_CLUSTERS,
        minimum=1,
    )
    iterations: int = option(
        20,
        "Maximum number of Lloyd iterations; fewer if no image changes its cluster.",
        group=_CLUSTERS,
        minimum=1,
    )
    train_rows: int | None = option(
        None,
        "Fit the centroids to a random sample of this many images, then assign all images to them. By default, fit to "
        "all.",
        group=_CLUSTERS,
        minimum=1,
    )
    max_bad_fraction: float = option(
        0.01,
        "Fail when more than this share of the embeddings is not finite or missing from the keep list.",
        group=_INPUTS,
        minimum=0.0,
        maximum=1.0,
        operational=True,
    )
