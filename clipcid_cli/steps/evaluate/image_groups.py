"""Groups of images that intervals draw whole, since near copies or pictures of one thing are no independent evidence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from clipcid_cli.algorithms.metrics.intervals import Array
from clipcid_cli.errors import UsageError
from clipcid_cli.formats.data.samples import Columns
from clipcid_cli.formats.fingerprint import record
from clipcid_cli.steps import reporting
from clipcid_cli.steps.settings.comparing import ComparingSettings

# Of fewer groups percentiles are too narrow (Cameron, Gelbach and Miller 2008, of clusters in regressions).
_FEW_GROUPS = 30


def refuse_groups_of_several(settings: ComparingSettings, datasets: Sequence[str]) -> None:
    """Refuse one table of groups for several data sets, whose keys may be the same."""
    if settings.groups is not None and len(datasets) > 1:
        raise UsageError(
            f"--groups is a table of the images of one data set, and there are {len(datasets)}: {', '.join(datasets)}.",
            "Give one data set at a time with --groups.",
        )


def find_groups(keys: Sequence[str], dataset: str, settings: ComparingSettings) -> Array | None:
    """Return the group of each image, int64 [N] from 0, and say how many there are; None where images are drawn alone."""
    if settings.groups is None:
        return None
    from clipcid_cli.formats.data.image_groups import read_groups

    groups = read_groups(settings.groups, settings.group_column, keys, _columns(settings))
    count = int(groups.max()) + 1
    of = f"{dataset}: {len(keys):,} images in {count:,} groups by {settings.group_column} of {settings.groups}"
    if count < _FEW_GROUPS:
        reporting.warn(f"{of}: so few groups make intervals that are too narrow.")
    else:
        reporting.note(f"{of}; the intervals draw whole groups.")
    return groups


def describe_groups(settings: ComparingSettings) -> dict[str, Any]:
    """Return the setting by which intervals of groups are told from those of images; a table without them is an error."""
    if settings.groups is None:
        return {}
    from clipcid_cli.formats.data.image_groups import validate_columns

    validate_columns(settings.groups, settings.group_column, _columns(settings))
    return {"groups": {"table": record(settings.groups).hash, "column": settings.group_column}}


def _columns(settings: ComparingSettings) -> Columns:
    return Columns(settings.image_column, settings.caption_column, settings.key_column)
