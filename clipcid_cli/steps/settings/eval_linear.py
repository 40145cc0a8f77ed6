"""Settings of `eval-linear`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from clipcid_cli.errors import UsageError
from clipcid_cli.steps.settings.fields import argument, option
from clipcid_cli.steps.settings.shared import ReadingSettings

_WHAT = "What is evaluated"
_HOW = "How the probe is fitted"
_SHOTS = "Few-shot curve"
METRICS = (
    "acc1",
    "mean_per_class_recall",
    "mean_average_precision",
    "mean_average_precision_11_point",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalLinearSettings(ReadingSettings):
    """Settings of `eval-linear`."""

    model: str | None = argument(
        None,
        "Model to evaluate: a folder, architecture:tag or hf-hub:org/name. By default the work directory's newest student. "
        "The first positional is always the model.",
    )
    data: str | None = argument(
        None,
        "Folder with train/ and test/ in it: CLIP_benchmark's folders of shards, or one folder of images per class; or the "
        "name of a usual data set, such as food101, of which --data-root holds a copy.",
    )
    train: str | None = option(
        None,
        "Images with classes to fit on, instead of DATA/train: a folder of tar shards with .cls, a folder of images per "
        "class, or a list with a `label` column.",
        group=_WHAT,
        metavar="DATA",
    )
    test: str | None = option(
        None, "Images with classes to measure on, instead of DATA/test.", group=_WHAT, metavar="DATA"
    )
    val: str | None = option(
        None,
        "Images with classes to choose the strength of regularisation on, instead of a part of the training images; the "
        "last fit takes both.",
        group=_WHAT,
        metavar="DATA",
    )
    data_root: Path = option(
        Path("data"), "Folder of the copies of data sets that are given by name.", group=_WHAT, operational=True
    )
    val_fraction: float = option(
        0.2,
        "Share of the training images, of each class alike, on which the strength of regularisation is chosen; not used "
        "with --val.",
        group=_HOW,
        minimum=0.0,
        maximum=0.9,
        above_minimum=True,
    )
    metric: str = option(
        "auto",
        "Metric by which the strength is chosen; `auto` is the data set's customary one (mean per class for Aircraft, Pets, "
        "Caltech101 and Flowers, 11-point average precision for VOC2007), else accuracy, or mean average precision where "
        "images have several classes.",
        group=_HOW,
        choices=("auto", *METRICS),
    )
    shots: str | None = option(
        None,
        "Also fit on few images of each class, for a curve: numbers such as 1,2,4,8,16.",
        group=_SHOTS,
        metavar="K,K,…",
    )
    shot_repeats: int = option(
        5, "Draws of images for each number of shots; mean and spread are over them.", group=_SHOTS, minimum=1
    )

    def __post_init__(self) -> None:
        """Check that there is data to fit on and to measure on."""
        super().__post_init__()
        _ = self.shot_counts
        if self.data is None and (self.train is None or self.test is None):
            missing = [flag for flag, value in (("--train", self.train), ("--test", self.test)) if value is None]
            raise UsageError(
                f"There is no data to probe on: {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing.",
                "Give --train and --test, or a folder that holds train/ and test/: clipcid eval-linear MODEL DATA",
            )

    @property
    def shot_counts(self) -> tuple[int, ...]:
        """Numbers of images of each class, ascending; none without a curve.

        Raises:
            UsageError: when the flag holds something other than whole numbers from 1 on.
        """
        if self.shots is None:
            return ()
        parts = [part.strip() for part in self.shots.split(",")]
        if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
            raise UsageError(
                f"--shots is {self.shots!r}, not whole numbers from 1 on with commas between.",
                "Write it as --shots 1,2,4,8,16.",
            )
        return tuple(sorted({int(part) for part in parts}))
