"""Settings of `eval-linear`."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from clipcid_cli.errors import UsageError
from clipcid_cli.steps.settings.comparing import ComparingSettings
from clipcid_cli.steps.settings.shared import AT_LEAST_1, Range, argument, group

METRICS = ("acc1", "mean_per_class_recall", "mean_average_precision", "mean_average_precision_11_point")

_data = group("Data")
_fit = group("Fitting the probe")
_shots = group("Few-shot curve")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalLinearSettings(ComparingSettings):
    """Settings of `eval-linear`."""

    command: ClassVar[str] = "eval-linear"

    data: str | None = argument(
        None,
        "Folder with train/ and test/ (CLIP_benchmark shards, or one folder of images per class), or the name of a known "
        "data set such as food101 with a copy in --data-root.",
    )
    train: str | None = _data(
        None,
        "Labeled images to fit on, instead of DATA/train: tar shards with .cls, one folder of images per class, or a list "
        "with a `label` column.",
        metavar="DATA",
    )
    test: str | None = _data(None, "Labeled images to measure on, instead of DATA/test.", metavar="DATA")
    val: str | None = _data(
        None,
        "Labeled images to choose the regularization on, instead of a part of the training images. The final fit uses "
        "both.",
        metavar="DATA",
    )
    val_fraction: float | None = _fit(
        None,
        "Share of the training images, stratified by class, to choose the regularization on; not used with --val. By "
        "default 0.2, or of fewer than 5,000 images every fifth in turn (five folds).",
        within=Range(0, 0.9, min_open=True),
    )
    metric: str = _fit(
        "auto",
        "Metric to choose the regularization by: `acc1`, `mean_per_class_recall`, `mean_average_precision`, "
        "`mean_average_precision_11_point`, or with `auto` the one usually reported for the data set.",
        choices=("auto", *METRICS),
        metavar="METRIC",
    )
    shots: str | None = _shots(None, "Also fit on this many images per class, for example 1,2,4,8,16.", metavar="K,K,…")
    shot_repeats: int = _shots(
        5, "Random draws per number of shots; mean and standard deviation are reported.", within=AT_LEAST_1
    )
    knn: str | None = group("Nearest neighbors")(
        None,
        "Also classify each test image by this many nearest training images, with votes weighted by "
        "exp(cosine/0.07), for example 10,20.",
        metavar="K,K,…",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.shot_counts, self.neighbour_counts
        if not self.compare and self.data is None and (self.train is None or self.test is None):
            missing = [flag for flag, value in (("--train", self.train), ("--test", self.test)) if value is None]
            verb = "is" if len(missing) == 1 else "are"
            message = f"There is no data to evaluate on: {' and '.join(missing)} {verb} missing."
            if self.model is not None:
                message += f"\n{self.model} was read as the model, because the first positional argument is the model."
            raise UsageError(
                message,
                "Give --train and --test, or a folder with train/ and test/: clipcid eval-linear MODEL DATA",
            )

    @property
    def named(self) -> tuple[str, ...]:
        return tuple(name for name in (self.model, self.data) if name is not None)

    @property
    def named_data(self) -> tuple[str, ...]:
        return tuple(name for name in (self.data, self.train, self.test, self.val) if name is not None)

    @property
    def shot_counts(self) -> tuple[int, ...]:
        """Numbers of images of each class, ascending; none without a curve."""
        return _read_counts("--shots", self.shots, "1,2,4,8,16")

    @property
    def neighbour_counts(self) -> tuple[int, ...]:
        """Numbers of nearest neighbours, ascending; none without --knn."""
        return _read_counts("--knn", self.knn, "10,20")


def _read_counts(flag: str, text: str | None, example: str) -> tuple[int, ...]:
    if text is None:
        return ()
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise UsageError(
            f"{flag} is {text!r}, not a list of whole numbers of at least 1, separated by commas.",
            f"For example: {flag} {example}",
        )
    return tuple(sorted({int(part) for part in parts}))
