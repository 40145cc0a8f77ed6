"""What `balance` reports of its sets: the JSON object, warnings, and which files hold what."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from clipcid_cli.formats.embeddings.folder import Embeddings
from clipcid_cli.formats.results.curve import CURVE
from clipcid_cli.formats.results.forest import forest_path
from clipcid_cli.formats.skips import Skips
from clipcid_cli.formats.work_directory import KEEP_LIST
from clipcid_cli.steps.balance.audit import Audit
from clipcid_cli.steps.balance.compare_linkage import OtherLinkage
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
    embeddings: Embeddings,
    skips: Skips,
) -> dict[str, Any]:
    """Return the fields of the JSON object, without ``seconds`` and ``files``."""
    kept, images = sets.num_kept, len(sets.labels)
    embedded = (embeddings.sidecar or {}).get("counts", {}).get("skipped", {})
    return {
        "images": images,
        "kept": kept,
        "keep_ratio": kept / images,
        "threshold": sets.threshold,
        "components": kept,
        "largest_component": sets.largest,
        "coverage": sets.coverage,
        "other_linkage": None
        if isinstance(other, NotComputed)
        else {"linkage": other.linkage, "kept": other.kept, "coverage": other.coverage},
        "neighbors": settings.neighbors,
        "audit": None if audit is None else dataclasses.asdict(audit) | {"rate": audit.rate},
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
    return f"{amount} --linkage {settings.linkage} --select {settings.select}{neighbors}"


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


def name_files(folder: Path, neighbors: str) -> dict[str, str]:
    """Return the path of each file by its name in the JSON object."""
    forest = forest_path(folder, neighbors).name
    names = {"keep_list": KEEP_LIST, "forest": forest, "curve": CURVE, "report": REPORT, "sidecar": "balance.json"}
    return {name: str(folder / file) for name, file in names.items()}
