"""Frozen image features with their classes, kept so that a model encodes a data set once.

The name of a file identifies its content: a hash of the weights, the preprocessing, the data and all else that determines
a feature. A file is complete or absent and never changes, so it needs neither a lock nor a sidecar.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.atomic import atomic_file
from clipcid_cli.formats.skips import Skips


@dataclasses.dataclass(frozen=True)
class Features:
    """Features of one data set.

    Attributes:
        rows: Unit rows, float32 [N, D].
        labels: Class of each image, int64 [N]; where images may have several, whether each image has each class,
            bool [N, C].
        skips: Samples that could not be used.
    """

    rows: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64] | npt.NDArray[np.bool_]
    skips: Skips


def features_path(folder: Path, model_slug: str, identity: dict[str, Any]) -> Path:
    """Return where features are kept.

    Args:
        model_slug: Name of the model for people; the hash distinguishes models of one name.
        identity: Everything that determines the features, as JSON values.
    """
    digest = hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=8).hexdigest()
    return folder / f"{model_slug}-{digest}.npz"


def write_features(path: Path, features: Features) -> None:
    """Write features atomically."""
    skips = json.dumps(features.skips.to_json())
    with atomic_file(path) as file:
        np.savez(file, rows=features.rows, labels=features.labels, skips=np.array(skips))


def read_features(path: Path) -> Features | None:
    """Read features; None when there are none.

    Raises:
        ClipcidError: when the file is damaged.
    """
    if not path.exists():
        return None
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            found = Features(file["rows"], file["labels"], Skips.from_json(json.loads(str(file["skips"]))))
        if found.rows.ndim != 2 or len(found.rows) != len(found.labels) or not np.isfinite(found.rows).all():
            raise ValueError(
                f"{list(found.rows.shape)} rows for {len(found.labels):,} labels, or rows that are not finite"
            )
        return found
    except Exception as error:  # zipfile, zlib, json and numpy raise what they like for a damaged archive
        raise ClipcidError(f"{path} cannot be read: {error}.", f"Remove it: rm {path}") from error
