"""Which preprocessing of open_clip other programs can do: to a square, by Pillow's bilinear or bicubic filter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# PIL's numbers of the filters, as Hugging Face stores them.
RESAMPLE = {"bilinear": 2, "bicubic": 3}


def square_side(size: Any) -> int | None:
    """Return the side of a square given as one number or two; None when it is not square."""
    if isinstance(size, list | tuple):
        return int(size[0]) if len(set(size)) == 1 else None
    return int(size)


def pixel_problems(preprocess: Mapping[str, Any]) -> list[str]:
    """Name the entries of open_clip's ``preprocess_cfg`` that cannot be expressed."""
    expressible = {
        "size": square_side(preprocess["size"]) is not None,
        "resize_mode": preprocess["resize_mode"] in ("shortest", "squash"),
        "interpolation": preprocess["interpolation"] in RESAMPLE,
    }
    return [f"preprocess_cfg.{name} is {preprocess[name]!r}" for name, good in expressible.items() if not good]
