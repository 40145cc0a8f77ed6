"""How well a zero-shot classifier knows how sure it is: as it is, and at a temperature fitted on half of the images."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from clipcid_cli.algorithms.metrics.calibration import BINS, Blocks, fit_scale, measure_calibration
from clipcid_cli.runtime.randomness import key_fractions
from clipcid_cli.runtime.threads import threads_for
from clipcid_cli.steps.evaluate.encode import EmbeddedBatch

FITTED_SHARE = 0.5


def calibrate(batches: list[EmbeddedBatch], weights: torch.Tensor, scale: float) -> dict[str, Any]:
    """Measure a classification of images that have one class each.

    Args:
        weights: Class weights, float32 [C, D], unit rows.
        scale: The model's factor on cosines.

    Returns:
        ``bins``; ``all``: all images at the model's own temperature; ``fitted_share, fitted_images, temperature``: the
        temperature that minimises the log loss of the images whose `key_fraction` is below the share, null where there is no
        minimum; ``before, after``: the other images at the model's own temperature and at that one, null where there is
        none. Each measurement is ``{temperature, expected_calibration_error, log_loss, images}``.
    """
    fitted = [key_fractions(batch.keys) < FITTED_SHARE for batch in batches]
    others = _blocks(batches, weights, [~chosen for chosen in fitted])
    has_others = not all(chosen.all() for chosen in fitted)
    with threads_for(max(len(batch.keys) for batch in batches) * weights.numel()):
        best = fit_scale(_blocks(batches, weights, fitted))
        return {
            "bins": BINS,
            "all": _measure(_blocks(batches, weights, [np.ones_like(chosen) for chosen in fitted]), scale),
            "fitted_share": FITTED_SHARE,
            "fitted_images": int(sum(chosen.sum() for chosen in fitted)),
            "temperature": None if best is None else 1 / best,
            "before": _measure(others, scale) if has_others else None,
            "after": _measure(others, best) if has_others and best is not None else None,
        }


def _blocks(batches: list[EmbeddedBatch], weights: torch.Tensor, chosen: list[npt.NDArray[np.bool_]]) -> Blocks:
    """Return what computes the cosines of the chosen images of each batch."""

    def compute() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for batch, which in zip(batches, chosen, strict=True):
            assert batch.labels is not None, "a classification has labels"
            if which.any():
                rows = torch.from_numpy(which)
                yield batch.images[rows] @ weights.T, batch.labels[rows]

    return compute


def _measure(blocks: Blocks, scale: float) -> dict[str, Any]:
    return {"temperature": 1 / scale, **dataclasses.asdict(measure_calibration(blocks, scale))}
