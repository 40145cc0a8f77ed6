"""The fits of `eval-linear` on given features: what is held out, drawn and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from balance_data import heard

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.results.features import Features
from clipcid_cli.runtime.models.names import ModelName
from clipcid_cli.steps.evaluate.linear import ProbeFits, ProbePlan
from clipcid_cli.steps.settings.eval_linear import EvalLinearSettings


def make_images(counts: list[int], seed: int = 0) -> Features:
    """Make unit rows around one centre for each class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    centres = torch.randn(len(counts), 6, generator=torch.Generator().manual_seed(9))
    rows = 0.7 * centres[labels] + torch.randn(len(labels), 6, generator=generator)
    return Features(torch.nn.functional.normalize(rows, dim=1), labels)


def make_fits(images: Features, **settings: Any) -> ProbeFits:
    return ProbeFits({"train": images}, make_plan(int(images.labels.max()) + 1, **settings))


def make_plan(classes: int, metric: str = "acc1", **settings: Any) -> ProbePlan:
    chosen = EvalLinearSettings(data="nowhere", **settings)
    names = tuple(map(str, range(classes)))
    return ProbePlan(ModelName("m", "tag"), "nowhere", names, metric, {}, Path("metrics.json"), chosen)


def test_few_shot_probes_see_no_image_that_chooses_their_strength() -> None:
    images = make_images([30, 30, 6])
    with heard() as told:
        fits = make_fits(images, shots="8,2", shot_repeats=2)
    assert told == ["--shots 8: 1 of 3 classes have fewer images, all of which are used."]
    assert len(fits.fitted) + len(fits.held_out) == len(images)
    held_out = {tuple(row) for row in fits.held_out.rows.tolist()}
    assert held_out.isdisjoint({tuple(row) for row in fits.fitted.rows.tolist()})
    curve = fits.few_shots(make_images([20, 20, 20], seed=1))
    assert [(point.shots, point.images) for point in curve] == [(2, 6), (8, 21)]
    half = make_fits(images, val_fraction=0.5)
    assert (len(half.fitted), len(half.held_out), len(half.images)) == (33, 33, 66)
    assert all(len(set(point.metrics["lp_acc1"].values)) <= 2 for point in curve)
    again = make_fits(images, shots="8", shot_repeats=2).few_shots(make_images([20, 20, 20], seed=1))
    assert again == curve[1:]


def test_a_best_strength_at_an_end_is_told_once_for_each_number_of_shots() -> None:
    # Classes that any strength tells apart: the strongest regularisation is taken, an end of the range.
    apart = Features(torch.eye(2).repeat_interleave(20, dim=0), torch.arange(2).repeat_interleave(20))
    with heard() as told:
        curve = make_fits(apart, shots="1,4", shot_repeats=3).few_shots(apart)
    assert [point.at_edge for point in curve] == [3, 3]
    assert [text.partition(" an end of")[0] for text in told] == [
        "--shots 1: the best C of 3 of 3 draws is",
        "--shots 4: the best C of 3 of 3 draws is",
    ]


def test_what_cannot_be_drawn_or_held_out_is_refused() -> None:
    with pytest.raises(
        ClipcidError, match="no class has 17 training images besides those held out; the largest has 16"
    ):
        make_fits(make_images([20, 10]), shots="17")
    with pytest.raises(ClipcidError, match="none can be held out"):
        make_fits(make_images([1, 1]))
    without = Features(torch.eye(4), torch.zeros(4, 2, dtype=torch.bool))
    with pytest.raises(ClipcidError, match="No validation image has a class"):
        ProbeFits({"train": without, "val": without}, make_plan(2, "mean_average_precision"))
    several = Features(torch.eye(4), torch.ones(4, 2, dtype=torch.bool))
    with pytest.raises(ClipcidError, match="to all training images or to none"):
        ProbeFits({"train": several}, make_plan(2, "mean_average_precision"))
