"""Settings of `eval-zeroshot`."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from clipcid_cli.errors import UsageError
from clipcid_cli.steps.settings.comparing import ComparingSettings
from clipcid_cli.steps.settings.shared import argument, group

SUITES = ("datacomp",)

_what = group("Models and data")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalZeroshotSettings(ComparingSettings):
    """Settings of `eval-zeroshot`."""

    command: ClassVar[str] = "eval-zeroshot"

    data: tuple[str, ...] = argument(
        (),
        "Data sets: CLIP_benchmark folders, one folder of images per class, lists, tar shards, or names such as food101, "
        "imagenet, voc2007 with copies in --data-root. By default, retrieval on the samples that `clipcid distill` held "
        "out.",
    )
    models: tuple[str, ...] = _what((), "Another model to evaluate; may be repeated.", flag="--model", metavar="MODEL")
    task: str = _what(
        "auto",
        "What to measure. `auto` follows the data set's dataset_type.txt; without one, it measures classification if there "
        "are classes and retrieval if there are captions.",
        choices=("auto", "classification", "multilabel", "retrieval"),
    )
    classnames: str | None = _what(
        None,
        "File with one class name per line, class 0 first, or `imagenet` for open_clip's names. By default, the data set's "
        "classnames.txt or folder names.",
        metavar="FILE",
    )
    templates: str | None = _what(
        None,
        "File with one prompt template per line, with {c} or {} for the class name, or `openai` or `simple` for open_clip's "
        "80 or 7 templates. By default, the data set's zeroshot_classification_templates.txt, else `a photo of a {c}.`",
        metavar="FILE",
    )
    suite: str | None = _what(
        None,
        "Measure all data sets of a suite of which the folder named last, else --data-root, holds copies, and their mean. "
        "`datacomp`: the 38 of DataComp's evaluation.",
        choices=SUITES,
    )
    split: str = _what("test", "Split of a CLIP_benchmark folder to use.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.suite is not None:
            self._validate_suite(self.suite)

    def _validate_suite(self, suite: str) -> None:
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        changing = ("compare", "task", "classnames", "templates", "split")
        given = [name for name in changing if getattr(self, name) != defaults[name]]
        if given:
            raise UsageError(
                f"--{given[0]} cannot be combined with --suite: a score of {suite} is of its own splits and prompts.",
                f"Omit --{given[0]}, or name the data sets one by one.",
            )
        if self.groups is not None:
            raise UsageError(
                f"--groups cannot be combined with --suite: no table has the groups of all data sets of {suite}.",
                "Omit --groups, or name the data sets one by one.",
            )

    @property
    def named(self) -> tuple[str, ...]:
        return (*([self.model] if self.model is not None else []), *self.data)

    @property
    def named_data(self) -> tuple[str, ...]:
        return self.data
