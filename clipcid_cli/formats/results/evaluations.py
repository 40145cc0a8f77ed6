"""The sidecars of `eval-zeroshot` and `eval-linear`, in ``eval/sidecars/``."""

from __future__ import annotations

from typing import Any

import msgspec

from clipcid_cli.formats.results.metrics import EvaluationSidecar


class ClassScore(msgspec.Struct):
    """How well one class is told."""

    name: str = msgspec.field(name="class")
    images: int
    value: float | None  # recall or, where images have several classes, average precision; None without images
    confused_with: str | None = None  # the wrong class most often predicted for its images, and how often
    confused: int = 0


class Example(msgspec.Struct):
    """An image for the report: its class, the one predicted, and where its bytes are."""

    key: str
    label: str
    predicted: str
    path: str
    offset: int
    size: int | None
    column: str | None = None  # of a parquet file, whose row `offset` it is


class ZeroshotSidecar(EvaluationSidecar, kw_only=True):
    """The sidecar of a metrics file of `eval-zeroshot`."""

    images_per_second: float
    customary: str
    intervals: dict[str, tuple[float, float]]
    groups: int | None = None  # of which the intervals are; None where they are of images
    chance: dict[str, float] = msgspec.field(default_factory=dict)
    majority: float | None = None
    per_class: list[ClassScore]
    examples: list[Example]


class LinearSidecar(EvaluationSidecar, kw_only=True):
    """The sidecar of an `eval-linear`."""

    result: dict[str, Any]
    solution: dict[str, Any]
    sweep: list[dict[str, Any]]
