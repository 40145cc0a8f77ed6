"""What a model predicted for each image: when it is written, and the columns of a classification."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from clipcid_cli.algorithms.metrics.classification import rank_classes, top_classes
from clipcid_cli.formats.output import Output
from clipcid_cli.formats.results.metrics import predictions_path
from clipcid_cli.steps import reporting
from clipcid_cli.steps.settings.comparing import ComparingSettings


def lacks_predictions(path: Path, what: str, settings: ComparingSettings) -> bool:
    """Tell whether predictions are asked for that a finished result does not have, and say so."""
    if not settings.predictions or predictions_path(path).is_file():
        return False
    reporting.note(f"{path} has no predictions; measuring {what} again.")
    return True


def wants_predictions(output: Output[Any], path: Path, settings: ComparingSettings) -> bool:
    """Tell whether predictions are written: where they are asked for, or there are earlier ones of the same model and data.

    They depend on nothing in which such results may differ, and so those that are there are kept up to date.
    """
    is_same = (output.finished or output.earlier) is not None
    return settings.predictions or (is_same and predictions_path(path).is_file())


def class_columns(labels: torch.Tensor, blocks: Iterable[torch.Tensor]) -> dict[str, Any]:
    """Return the columns of images that have one class each, by the scores of block after block of them."""
    predicted, scores_of_top, top = list[int](), list[list[float]](), list[list[int]]()
    first = 0
    for scores in blocks:
        predicted += rank_classes(scores, labels[first : first + len(scores)])[0].tolist()
        largest, classes = top_classes(scores)
        scores_of_top += largest.tolist()
        top += classes.tolist()
        first += len(scores)
    return {"label": labels.tolist(), "predicted": predicted, "top": top, "scores": scores_of_top}


def multi_label_columns(positive: torch.Tensor, scores: torch.Tensor) -> dict[str, Any]:
    """Return the columns of images that may have several classes."""
    scores_of_top, top = top_classes(scores)
    return {
        "labels": [row.nonzero().squeeze(1).tolist() for row in positive],
        "predicted": top[:, 0].tolist(),
        "top": top.tolist(),
        "scores": scores_of_top.tolist(),
        "class_scores": scores.tolist(),
    }
