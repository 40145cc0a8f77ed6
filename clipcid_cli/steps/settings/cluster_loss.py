"""The flags of the cluster loss."""

from __future__ import annotations

import dataclasses
from typing import Any

from clipcid_cli.errors import UsageError
from clipcid_cli.steps.settings.fields import flag_of, option

_FLAGS = (
    "clusters",
    "cluster_towers",
    "label_share",
    "candidate_ratio",
    "min_candidates",
    "candidate_correction",
    "cluster_temperature",
)


def clusters_option(group: str) -> Any:
    """Declare the flag of the clusters it reads."""
    return option(
        None,
        "Output folder of `clipcid cluster`; by default the one in the work directory.",
        group=group,
        operational=True,
    )


def cluster_towers_option(group: str) -> Any:
    """Declare the flag of which towers it trains."""
    return option(
        "auto",
        "Student towers that the cluster loss trains. `both` needs clusters made with text embeddings; `auto` uses both "
        "where possible.",
        group=group,
        choices=("auto", "image", "both"),
    )


def label_share_option(group: str) -> Any:
    """Declare the flag of the weight of the label in its target."""
    return option(
        0.5,
        "Weight α of the k-means label in the cluster target; the rest is the teacher's soft distribution over clusters.",
        group=group,
        minimum=0.0,
        maximum=1.0,
    )


def candidate_ratio_option(group: str) -> Any:
    """Declare the flag of the share of centroids drawn."""
    return option(
        0.1,
        "Share of all centroids that are sampled as negatives for a batch, in addition to the batch's own clusters.",
        group=group,
        minimum=0.0,
        maximum=1.0,
    )


def min_candidates_option(group: str) -> Any:
    """Declare the flag of the smallest number of centroids."""
    return option(
        4096,
        "Minimum number of centroids a batch is compared with; all if there are fewer.",
        group=group,
        minimum=1,
    )


def candidate_correction_option(group: str) -> Any:
    """Declare the flag of the correction for the draw."""
    return option(
        True,
        "Correct the softmax over sampled centroids for their sampling rate; without it, the batch's own clusters are "
        "overestimated.",
        group=group,
    )


def cluster_temperature_option(group: str) -> Any:
    """Declare the flag of the temperature of the soft target."""
    return option(
        None,
        "Temperature of the teacher's distribution over clusters; by default the one that `clipcid cluster` chose.",
        group=group,
        minimum=0.0,
        above_minimum=True,
    )


def refuse_cluster_flags(settings: Any) -> None:
    """Refuse flags of the cluster loss in a run without it.

    Args:
        settings: Those of `distill`.

    Raises:
        UsageError: for each that is not at its default.
    """
    given = [
        flag_of(field)
        for field in dataclasses.fields(settings)
        if field.name in _FLAGS and getattr(settings, field.name) != field.default
    ]
    if given:
        flags = ", ".join(given)
        fix = f"Omit {flags}"
        if settings.teacher != "none":
            fix += ", or use --preset cid or --loss cluster=0.5"
        raise UsageError(f"{flags}: for the cluster loss, which the run does not have.", f"{fix}.")
