"""What `--compare` of both evaluations answers: the JSON objects, in the order of their keys."""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from clipcid_cli.formats.results.metrics import LinesRecord
from clipcid_cli.records import Draws


class ComparedLines(msgspec.Struct):
    """The class names, or the templates, of the two results that are compared."""

    first: LinesRecord
    second: LinesRecord
    same: bool


class Difference(msgspec.Struct):
    """One metric of both sides, second minus first; `real` where it is more than the choice of images explains."""

    first: float | Draws  # of several seeds `Draws`
    # Likewise; then `difference` is that of the means, and `interval` and `real` count the choice of seeds too.
    second: float | Draws
    difference: float
    interval: tuple[float, float]
    p_value: float | None  # McNemar's, of a pair of results whose metric counts images that are right or wrong
    real: bool
    enough_seeds: bool  # whether there are seeds enough for a verdict; of two results on one seed each always
    verdict: str
    # Of the margin, where one was given and there are seeds enough: whether the second loses less than it to the first, and
    # whether neither loses so much to the other.
    no_worse: bool | None = None
    equivalent: bool | None = None


class ComparisonResult(msgspec.Struct):
    """Two results on the same images, or of several seeds the results of each side."""

    compared: list[str] | list[list[str]]  # two files, or a list of files for each side
    models: list[str] | list[list[str]]  # of these files
    dataset: str
    images: int
    prompts: dict[str, ComparedLines] | None  # None for retrieval, and where nothing records them
    differences: dict[str, Difference]
    files: dict[str, str]
    margin: float | None = None  # in points
    groups: int | None = None  # of images that the intervals draw together; None where they draw each by itself


class MeanDifference(Difference, kw_only=True):
    """The mean over data sets of one task, of the customary metric of each."""

    task: str
    counted: dict[str, str]  # the metric that counts, by data set


class ComparisonResults(msgspec.Struct):
    """Two models, or seeds of each, on several data sets; `means` are over those of one task."""

    results: list[ComparisonResult]
    means: list[MeanDifference]
    margin: float | None
    files: dict[str, str]


Comparison: TypeAlias = ComparisonResult | ComparisonResults
