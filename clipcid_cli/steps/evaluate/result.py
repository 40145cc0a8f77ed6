"""What `eval-zeroshot` answers: the JSON objects, in the order of their keys."""

from __future__ import annotations

from pathlib import Path

import msgspec

from clipcid_cli.formats.results.metrics import LinesRecord, Metrics


class Preview(msgspec.Struct):
    """What a dry run would measure."""

    dataset: str
    model: str
    task: str
    files: dict[str, str]
    reused: bool = False  # whether the result is there already


class Previews(msgspec.Struct):
    """What a dry run would measure of several pairs of model and data set."""

    results: list[Preview]


class ZeroshotResult(Metrics, kw_only=True):
    """A model on a data set."""

    prompts: dict[str, LinesRecord] | None  # ``class_names`` and ``templates``; None for retrieval
    customary: str  # name of the metric usually reported for the data set
    intervals: dict[str, tuple[float, float]]  # the 95 % interval of each metric; none with ``--bootstrap 0``
    groups: int | None  # of images that the intervals draw together; None where they draw each by itself
    chance: dict[str, float]  # what a guess scores, of the metrics where that is known
    majority: float | None  # share of the images in the largest class, where each has one
    images: int
    skipped: dict[str, int]
    images_per_second: float
    seconds: dict[str, float]
    # ``metrics``, and ``predictions`` where they were asked for; of a single pair ``table`` and ``report`` too.
    files: dict[str, str]
    reused: bool

    @property
    def shown_model(self) -> str:
        """The model's name for people: of a folder the short one, since its path would take half a terminal."""
        return self.model if Path(self.pretrained).is_dir() else f"{self.model} {self.pretrained}"


class MeanScore(msgspec.Struct):
    """What a model scores on the mean of several data sets of one task, by the customary metric of each."""

    model: str
    pretrained: str
    task: str
    counted: dict[str, str]  # the metric that counts, by data set
    value: float
    interval: tuple[float, float] | None  # 95 %, over the images of all of them; None with ``--bootstrap 0``


class ZeroshotResults(msgspec.Struct):
    """Every model on every data set; `files` are ``table`` and ``report``."""

    results: list[ZeroshotResult]
    files: dict[str, str]
    means: list[MeanScore] = msgspec.field(default_factory=list)  # one for each model and task with several data sets
