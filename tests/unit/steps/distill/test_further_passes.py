"""What losses ask of the student beyond an image's and a caption's feature: masked images, patches and tokens."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_CONFIG

from clipcid_cli.errors import ClipcidError
from clipcid_cli.runtime.models.augment import Masking
from clipcid_cli.steps.distill.student import load_student
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.distill import DistillSettings

RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}


class Notes(Reporter):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, message: str) -> None:
        self.said.append(message)


def load(folder: Path, vision: dict[str, object], *losses: str) -> tuple[Masking | None, list[str]]:
    path = folder / "student.json"
    path.write_text(json.dumps(TINY_CONFIG | {"vision_cfg": vision}))
    settings, notes = DistillSettings(student=str(path), preset="clip", loss=losses), Notes()
    student = load_student(settings, torch.device("cpu"), notes)
    return student.masking, notes.said


def test_the_cost_of_masked_images_is_stated(tmp_path: Path) -> None:
    vision = {"image_size": 32, "patch_size": 8, "layers": 1, "width": 32, "head_width": 16}
    assert load(tmp_path, vision) == (None, [])
    masking, said = load(tmp_path, vision, "mfd=1")
    assert masking == Masking(4, 16)
    assert said == ["mfd encodes each image once more, with 4 of its 16 patches: 29% more work for the image tower."]


@pytest.mark.parametrize("loss", ["mfd", "td"])
def test_an_image_tower_without_patches_is_refused(loss: str, tmp_path: Path) -> None:
    with pytest.raises(ClipcidError, match="ModifiedResNet"):
        load(tmp_path, RESNET, f"{loss}=1")
    assert load(tmp_path, RESNET, "fd=1") == (None, [])


def test_masks_depend_on_their_seed_and_hide_three_quarters() -> None:
    masking = Masking.of(0.75, 49)
    drawn = [masking.choose(seed) for seed in range(300)]
    assert all(len(set(kept.tolist())) == 12 and (np.diff(kept) > 0).all() for kept in drawn)
    np.testing.assert_array_equal(masking.choose(5), drawn[5])
    # Each patch is seen about equally often: 300 · 12/49 = 73 times, with a standard deviation of 7.4.
    counts = np.bincount(np.concatenate(drawn), minlength=49)
    assert 40 < counts.min() <= counts.max() < 110
    assert Masking.of(0.75, 1) == Masking(1, 1)
