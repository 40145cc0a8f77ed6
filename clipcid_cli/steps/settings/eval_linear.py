"""Settings of `eval-linear`."""

from __future__ import annotations

import dataclasses

from clipcid_cli.errors import UsageError
from clipcid_cli.steps.settings.fields import argument, option
from clipcid_cli.steps.settings.shared import ReadingSettings

_WHAT = "What is evaluated"
_HOW = "How the probe is fitted"


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
        "Folder with train/ and test/ in it: CLIP_benchmark's folders of shards, or one folder of images per class.",
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
    val_fraction: float = option(
        0.2,
        "Share of the training images, of each class alike, on which the strength of regularisation is chosen.",
        group=_HOW,
        minimum=0.0,
        maximum=0.9,
        above_minimum=True,
    )

    def __post_init__(self) -> None:
        """Check that there is data to fit on and to measure on."""
        super().__post_init__()
        if self.data is None and (self.train is None or self.test is None):
            missing = [flag for flag, value in (("--train", self.train), ("--test", self.test)) if value is None]
            raise UsageError(
                f"There is no data to probe on: {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing.",
                "Give --train and --test, or a folder that holds train/ and test/: clipcid eval-linear MODEL DATA",
            )

    @property
    def train_data(self) -> str:
        """What to fit on."""
        return self.train if self.train is not None else f"{str(self.data).rstrip('/')}/train"

    @property
    def test_data(self) -> str:
        """What to measure on."""
        return self.test if self.test is not None else f"{str(self.data).rstrip('/')}/test"
