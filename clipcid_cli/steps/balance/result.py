"""What `balance` reports of its sets: the JSON object, warnings, and which files hold what."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from clipcid_cli.formats.embeddings.folder import Embeddings
from clipcid_cli.formats.results.forest import forest_path
from clipcid_cli.formats.results.sets import CURVE, SET_TABLE
from clipcid_cli.formats.skips import Skips
from clipcid_cli.formats.work_directory import KEEP_LIST
from clipcid_cli.steps.balance.audit import Audit
from clipcid_cli.steps.balance.compare_linkage import OtherLinkage
from clipcid_cli.steps.balance.filters.cluster_cap import ClusterCap
from clipcid_cli.steps.balance.filters.select import Filters
from clipcid_cli.steps.balance.pairs import NotComputed
from clipcid_cli.steps.balance.sets import Sets
from clipcid_cli.steps.settings.balance import BalanceSettings

REPORT = "report.html"

# A set that holds this share of all images is a chain or a placeholder more often than many copies of one picture.
_LARGE_SET = 0.01


def summarise(
    settings: BalanceSettings,
    sets: Sets,
    other: OtherLinkage | NotComputed,
    audit: Audit | None,
    filters: Filters,
    cap: ClusterCap | None,
    embeddings: Embeddings,
    skips: Skips,
) -> dict[str, Any]:
    """Return the fields of the JSON object, without ``seconds`` and ``files``."""
    images, searched, capped = len(filters.everything), len(sets.labels), None if cap is None else cap.summarise()
    too_many = 0 if capped is None else capped["dropped"]
    kept = sets.num_kept - too_many
    near = 0 if filters.near is None else int(np.count_nonzero(~filters.near.is_far))
    embedded = {} if embeddings.sidecar is None else embeddings.sidecar.counts["skipped"]
    return {
        "images": images,
        "searched": searched,
        "kept": kept,
        "keep_ratio": kept / images,
        "threshold": sets.threshold,
        "components": sets.num_kept,
        "largest_component": sets.largest,
        "uncovered_ratio": sets.uncovered_ratio,
        "other_linkage": None
        if isinstance(other, NotComputed)
        else {"linkage": other.linkage, "kept": other.kept, "uncovered_ratio": other.uncovered_ratio},
        "neighbors": settings.neighbors,
        "audit": None if audit is None else dataclasses.asdict(audit) | {"rate": audit.rate},
        "dropped_by": {
            "reference": near,
            "caption": images - searched - near,
            "repeat": searched - sets.num_kept,
            "cluster": too_many,
        },
        **filters.summarise(),
        "cluster_cap": capped,
        "skipped": {**embedded, **skips.counts},
    }


def find_warnings(settings: BalanceSettings, sets: Sets) -> list[str]:
    """Explain what may surprise: ties at the cut-off, copies beyond the target, one very large group."""
    warnings = []
    images, kept = len(sets.labels), sets.num_kept
    if settings.keep is not None:
        missed = max(1, round(settings.keep * images)) - kept
        if missed > 0 and sets.threshold == 0.0:
            warnings.append(
                f"There are more exact copies than --keep {settings.keep:g} drops images, and all of them are dropped: "
                f"{kept:,} images are kept, {missed:,} fewer than requested."
            )
        elif missed > 0:
            warnings.append(
                f"Pairs tie at the cut-off {sets.threshold:.6g}, and all of them merge: {kept:,} images are kept, "
                f"{missed:,} fewer than requested."
            )
    largest = sets.largest
    if largest > 1 and largest > _LARGE_SET * images:
        advice = "; --linkage star keeps groups compact" if settings.linkage == "single" else ""
        warnings.append(
            f"One group holds {largest:,} of {images:,} images ({largest / images:.1%}). It may be a chain of different "
            f"images, or a placeholder: see the report{advice}."
        )
    return warnings


def describe_rule(settings: BalanceSettings) -> str:
    """Return the flags that decide what is kept."""
    if settings.keep is not None:
        amount = f"--keep {settings.keep:g}"
    elif settings.threshold is not None:
        amount = f"--threshold {settings.threshold:g}"
    else:
        amount = f"--cosine-distance {settings.cosine_distance:g}"
    neighbors = "" if settings.neighbors == "exact" else f" --neighbors {settings.neighbors}"
    against = "".join(f" --against {name}" for name in settings.against)
    if settings.against_threshold is not None:
        against += f" --against-threshold {settings.against_threshold:g}"
    ends = {"min": settings.min_caption_similarity, "max": settings.max_caption_similarity}
    window = "".join(f" --{name}-caption-similarity {end:g}" for name, end in ends.items() if end is not None)
    cap = "" if settings.max_per_cluster is None else f" --max-per-cluster {settings.max_per_cluster}"
    return f"{amount}{against}{window} --linkage {settings.linkage} --select {settings.select}{neighbors}{cap}"


def explain_unread(pictures: dict[str, Any]) -> list[str]:
    """Warn of pictures that the report does not show.

    Args:
        pictures: What `write_report` returned.
    """
    missing = len(pictures["unread"])
    if not missing:
        return []
    return [
        f"The report shows {pictures['shown']:,} of {pictures['shown'] + missing:,} pictures: {pictures['why']} Once they "
        "can be read, the same command writes it with them."
    ]


def name_files(folder: Path, forest_kind: str) -> dict[str, str]:
    """Return the path of each file by its name in the JSON object.

    Args:
        forest_kind: Which forest was made, see `forest_path`.
    """
    forest = forest_path(folder, forest_kind).name
    names = {
        "keep_list": KEEP_LIST,
        "forest": forest,
        "sets": SET_TABLE,
        "curve": CURVE,
        "report": REPORT,
        "sidecar": "balance.json",
    }
    return {name: str(folder / file) for name, file in names.items()}
