"""Compiled towers train on a GPU as others do."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Clipcid
from distill_data import SHORT, losses

pytestmark = pytest.mark.gpu


def test_compiled_towers_learn_the_same(clipcid: Clipcid, distill_place: Path) -> None:
    options = ("distill", *SHORT, "--steps", 4, "--precision", "fp32", "--device", "cuda", "--name")
    clipcid(*options, "plain")
    clipcid(*options, "compiled", "--torchcompile")
    runs = distill_place / "clipcid-work" / "distill"
    for plain, compiled in zip(losses(runs / "plain"), losses(runs / "compiled"), strict=True):
        assert compiled["loss"] == pytest.approx(plain["loss"], rel=1e-3)
