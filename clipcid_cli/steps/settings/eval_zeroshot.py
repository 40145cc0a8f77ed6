"""Settings of `eval-zeroshot`."""

from __future__ import annotations

import dataclasses

from clipcid_cli.errors import UsageError
from clipcid_cli.steps.settings.shared import (
    ABOVE_0,
    EvaluationSettings,
    Range,
    argument,
    flag_of,
    given_fields,
    group,
    setting_of,
)

SUITES = ("datacomp",)

# Settings that a comparison follows.
_COMPARING = frozenset({"model", "data", "bootstrap", "margin", "seed"})

_what = group("Models and data")
_result = group("Results")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalZeroshotSettings(EvaluationSettings):
    """Settings of `eval-zeroshot`."""

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
    bootstrap: int = _result(1000, "Bootstrap samples for the 95% intervals; 0 disables them.", within=Range(0))
    predictions: bool = _result(
        False,
        "Also write the predictions for each image to a parquet file (key, label, predicted, top, scores).",
        operational=True,
    )
    compare: bool = _result(
        False,
        "Test whether two results differ significantly instead of measuring: `--compare A.json B.json`, two metrics files "
        "that were made with --predictions. For several seeds of each, give two patterns in quotes, or two lists with "
        "commas.",
        operational=True,
    )
    margin: float | None = _result(
        None,
        "With --compare, the largest loss that does not matter, in points: also tell whether B is no worse than A by so "
        "much, or both are equivalent. Choose it before you look.",
        within=ABOVE_0,
        operational=True,
    )

    def __post_init__(self) -> None:
        """Check that a comparison has two sides and no more to do."""
        super().__post_init__()
        if self.suite is not None:
            self._validate_suite(self.suite)
        if self.compare:
            self._validate_comparison()
        elif self.margin is not None:
            raise UsageError(
                "--margin has no effect without --compare.",
                "Compare two results: clipcid eval-zeroshot --compare A.json B.json --margin 1",
            )

    def _validate_suite(self, suite: str) -> None:
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        changing = ("compare", "task", "classnames", "templates", "split")
        given = [name for name in changing if getattr(self, name) != defaults[name]]
        if given:
            raise UsageError(
                f"--{given[0]} cannot be combined with --suite: a score of {suite} is of its own splits and prompts.",
                f"Omit --{given[0]}, or name the data sets one by one.",
            )

    def _validate_comparison(self) -> None:
        named = [*([self.model] if self.model is not None else []), *self.data]
        if len(named) != 2:
            fix = "Give both: clipcid eval-zeroshot --compare A.json B.json"
            if len(named) > 2:
                fix = (
                    "Give several seeds of each as two patterns in quotes, or as two lists with commas: clipcid "
                    "eval-zeroshot --compare 'A-*.json' 'B-*.json'"
                )
            raise UsageError(
                f"--compare needs two metrics files, but {len(named)} {'was' if len(named) == 1 else 'were'} given.",
                fix,
            )
        if self.bootstrap == 0:
            raise UsageError(
                "--compare needs bootstrap samples, but --bootstrap is 0.", "Omit --bootstrap or give --bootstrap 1000."
            )
        # Settings of a measurement have no effect here; ignoring them silently would mislead.
        idle = [
            flag_of(field)
            for field in given_fields(self)
            if field.name not in _COMPARING and (field.name == "predictions" or not setting_of(field).operational)
        ]
        if idle:
            raise UsageError(
                f"{', '.join(idle)} {'has' if len(idle) == 1 else 'have'} no effect with --compare, which measures nothing.",
                "Give only --margin, --bootstrap and --seed with --compare.",
            )

    @property
    def compared(self) -> tuple[str, str]:
        """Both sides of ``--compare``: a metrics file each, or several, as a pattern or with commas between them."""
        assert self.compare
        assert self.model is not None
        return self.model, self.data[0]
