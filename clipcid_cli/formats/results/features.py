"""Frozen image features with their keys and classes, kept so that a model encodes a data set once.

A file's name identifies its content, so that it never changes: it needs neither a lock nor a sidecar.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from clipcid_cli.formats.arrays import load_arrays, save_arrays
from clipcid_cli.formats.fingerprint import hash_json
from clipcid_cli.formats.skips import Skips

# How far from 1 the length of a row may be: rounding, also of models that compute in 16 bits.
_LENGTH_TOLERANCE = 1e-2


@dataclasses.dataclass(frozen=True)
class ImageFeatures:
    """Features of some images."""

    rows: torch.Tensor  # unit rows, float32 [N, D]
    labels: torch.Tensor  # class of each image, int64 [N], or whether it has each class, bool [N, C]
    skips: Skips = dataclasses.field(default_factory=Skips)
    keys: Sequence[str] = ()  # of a whole split

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, chosen: torch.Tensor) -> ImageFeatures:
        """Return the features of some of the images, by index or mask."""
        chosen = chosen.to(self.rows.device)
        return ImageFeatures(self.rows[chosen], self.labels[chosen])

    def to(self, device: torch.device) -> ImageFeatures:
        return ImageFeatures(self.rows.to(device), self.labels.to(device), keys=self.keys)


def features_path(folder: Path, model_slug: str, identity: dict[str, Any]) -> Path:
    """Return where features are kept: under the model's name, for people, and a hash of all that determines them."""
    return folder / f"{model_slug}-{hash_json(identity)}.npz"


def write_features(path: Path, features: ImageFeatures) -> None:
    """Write features, whole or not at all."""
    skips = json.dumps(dataclasses.asdict(features.skips))
    rows, labels = features.rows.numpy(), features.labels.numpy()
    keys = json.dumps([*features.keys])  # which may end with NULs, as NumPy's texts cannot
    save_arrays(path, {"rows": rows, "labels": labels, "keys": keys, "skips": skips})


def read_features(path: Path) -> ImageFeatures | None:
    """Read features; None where there are none, or they are damaged: the data set is then encoded again."""
    arrays = load_arrays(path)
    if arrays is None or not {"rows", "labels", "keys", "skips"}.issubset(arrays):
        return None
    rows, labels = (torch.from_numpy(arrays[name]) for name in ("rows", "labels"))
    lengths = torch.linalg.vector_norm(rows, dim=-1)
    if rows.ndim != 2 or len(rows) != len(labels) or not bool(((lengths - 1).abs() < _LENGTH_TOLERANCE).all()):
        return None
    try:  # of a stranger's work directory, whose hash fits what is in it
        keys, skips = json.loads(str(arrays["keys"])), Skips(**json.loads(str(arrays["skips"])))
    except (ValueError, TypeError, RecursionError):
        return None
    if not isinstance(keys, list) or [type(key) for key in keys] != [str] * len(rows):
        return None
    return ImageFeatures(rows, labels, skips, keys)
