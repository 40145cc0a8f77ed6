"""Which model a command means, and how models of one name are told apart."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from conftest import write_tiny_model

from clipcid_cli.runtime.models.names import parse_model
from clipcid_cli.steps.models import tell_apart


def test_model_folders_of_one_name_have_names_of_their_own(tmp_path: Path) -> None:
    first = write_tiny_model(tmp_path / "first" / "tiny")
    second = shutil.copytree(first, tmp_path / "second" / "tiny")
    weights = second / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    link = tmp_path / "link"
    link.symlink_to(first)
    slugs = [name.slug for name in tell_apart([parse_model(str(path)) for path in (first, second, link)])]
    assert slugs[0] == slugs[2] == "tiny", "a model that is named twice is one model"
    assert re.fullmatch(r"tiny-[0-9a-f]{8}", slugs[1])
