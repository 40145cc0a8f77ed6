"""Settings that both evaluations have of intervals, predictions, and the comparison of two results."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import ClassVar

from clipcid_cli.errors import UsageError
from clipcid_cli.steps.settings.shared import (
    ABOVE_0,
    EvaluationSettings,
    Range,
    flag_of,
    given_fields,
    group,
    setting_of,
)

# Settings that a comparison follows.
_COMPARING = frozenset({"model", "data", "bootstrap", "groups", "group_column", "margin", "seed"})
# Settings by which the table of groups is read.
_OF_GROUPS = frozenset({"key_column", "image_column"})

_result = group("Results")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparingSettings(EvaluationSettings):
    """Settings of an evaluation whose results are compared."""

    command: ClassVar[str]

    bootstrap: int = _result(1000, "Bootstrap samples for the 95% intervals; 0 disables them.", within=Range(0))
    groups: Path | None = _result(
        None,
        "Table (csv, tsv, parquet) with the `key` and the group of each image, such as the keep list of `clipcid balance` "
        "on the test images: the intervals draw whole groups, since near copies, or images of one thing, are no "
        "independent evidence.",
        metavar="FILE",
    )
    group_column: str = _result(
        "component", "Column of --groups with the groups; of a keep list its sets of near images.", metavar="NAME"
    )
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
        if self.compare:
            self._validate_comparison()
        elif self.margin is not None:
            raise UsageError(
                "--margin has no effect without --compare.",
                f"Compare two results: clipcid {self.command} --compare A.json B.json --margin 1",
            )
        if self.groups is None and self.group_column != ComparingSettings.group_column:
            raise UsageError(
                "--group-column has no effect without --groups.",
                f"Name the table with that column: --groups FILE --group-column {self.group_column}",
            )
        if self.groups is not None and self.bootstrap == 0:
            raise UsageError(
                "--groups has no effect without bootstrap samples, but --bootstrap is 0.",
                "Omit --bootstrap or --groups.",
            )

    def _validate_comparison(self) -> None:
        named = self.named
        if len(named) != 2:
            fix = f"Give both: clipcid {self.command} --compare A.json B.json"
            if len(named) > 2:
                fix = (
                    "Give several seeds of each as two patterns in quotes, or as two lists with commas: clipcid "
                    f"{self.command} --compare 'A-*.json' 'B-*.json'"
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
        followed = _COMPARING if self.groups is None else _COMPARING | _OF_GROUPS
        idle = [
            flag_of(field)
            for field in given_fields(self)
            if field.name not in followed and (field.name == "predictions" or not setting_of(field).operational)
        ]
        if idle:
            raise UsageError(
                f"{', '.join(idle)} {'has' if len(idle) == 1 else 'have'} no effect with --compare, which measures nothing.",
                "Give only --margin, --bootstrap, --seed, and --groups with its columns beside --compare.",
            )

    @property
    def named(self) -> tuple[str, ...]:
        """What was named without a flag: a model and data, or both sides of ``--compare``."""
        raise NotImplementedError

    @property
    def compared(self) -> tuple[str, str]:
        """Both sides of ``--compare``: a metrics file each, or several, as a pattern or with commas between them."""
        assert self.compare
        first, second = self.named
        return first, second
