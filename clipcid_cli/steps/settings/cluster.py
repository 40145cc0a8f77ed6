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
        "Folder of embeddings to cluster, in clip-retrieval's layout; by default the work directory's.",
        group=_INPUTS,
        operational=True,
    )
    npz_array: str | None = npz_array_option(_INPUTS)
    keep_list: str | None = option(
        None,
        "Keep list of `clipcid balance`: cluster its kept images only; `none` for all. By default the work directory's, "
        "where there is one.",
        group=_INPUTS,
        operational=True,
    )
    features: str = option(
        "image",
        "What is clustered: image embeddings, or `joint`, the normalised sum of image and caption embeddings.",
        group=_CLUSTERS,
        choices=("image", "joint"),
    )
    num_clusters: int | None = option(
        None,
        "Number of clusters; by default one for 225 images, at most 1,000,000, and for small data at least 256 or one for "
        "8 images.",
        group=_CLUSTERS,
        minimum=1,
    )
    iterations: int = option(
        20,
        "Most Lloyd iterations; it ends earlier when no image moves any more. Up to a quarter of them, the first 3 at most, "
        "compare images along 64 directions only, where these hold enough of them.",
        group=_CLUSTERS,
        minimum=1,
    )
    train_rows: int | None = option(
        None,
        "Find the centroids from this many images only, drawn by the seed; all are assigned to them then. By default all "
        "are used throughout.",
        group=_CLUSTERS,
        minimum=1,
    )
    max_bad_fraction: float = option(
        0.01,
        "Largest share of rows that are not finite, or that the keep list lacks, before the step fails.",
        group=_INPUTS,
        minimum=0.0,
        maximum=1.0,
        operational=True,
    )
