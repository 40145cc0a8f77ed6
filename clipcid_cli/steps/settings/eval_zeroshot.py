"""Settings of `eval-zeroshot`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from clipcid_cli.steps.settings.fields import argument, option
from clipcid_cli.steps.settings.shared import ReadingSettings

_WHAT = "What is evaluated"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalZeroshotSettings(ReadingSettings):
    """Settings of `eval-zeroshot`."""

    model: str | None = argument(
        None,
        "Model to evaluate: a folder, architecture:tag or hf-hub:org/name. By default the work directory's newest student. "
        "The first positional is always the model.",
    )
    data: tuple[str, ...] = argument(
        (),
        "Data sets: CLIP_benchmark folders, class-per-folder images, lists or tar shards. With none, retrieval on the part "
        "that distill held out.",
    )
    models: tuple[str, ...] = option(
        (), "One more model; may be repeated.", group=_WHAT, flag="--model", metavar="MODEL"
    )
    task: str = option(
        "auto",
        "What to measure; `auto` follows the data set's dataset_type.txt, else classification where there are classes and "
        "retrieval where there are captions.",
        group=_WHAT,
        choices=("auto", "classification", "retrieval"),
    )
    classnames: Path | None = option(
        None,
        "File with one class name a line; line 1 is class 0. By default the data set's classnames.txt or folder names.",
        group=_WHAT,
    )
    templates: Path | None = option(
        None,
        "File with one prompt template a line, {c} or {} where the class name goes. By default the data set's "
        "zeroshot_classification_templates.txt, else `a photo of a {c}.`",
        group=_WHAT,
    )
    split: str = option("test", "Split to use of a CLIP_benchmark folder that has several.", group=_WHAT)
