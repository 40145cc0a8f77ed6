"""What is kept out while open_clip is imported, and how it comes in when a model needs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

LEFT_OUT = ("transformers", "timm", "torch._dynamo", "torch._dynamo.utils")


def run_python(script: str, cwd: Path, **environment: str) -> str:
    """Run a script in a fresh interpreter and return what it printed."""
    environment = {**os.environ, **environment}
    command = [sys.executable, "-W", "ignore", "-c", script]
    return subprocess.run(command, check=True, cwd=cwd, env=environment, stdout=subprocess.PIPE, text=True).stdout


def imported_by(statement: str, cwd: Path) -> dict[str, bool]:
    """Tell which of `LEFT_OUT` a statement imports."""
    script = f"import json, sys, torch\n{statement}\nprint(json.dumps([name in sys.modules for name in {LEFT_OUT}]))"
    return dict(zip(LEFT_OUT, json.loads(run_python(script, cwd)), strict=True))


def test_each_stand_in_is_still_needed(tmp_path: Path) -> None:
    """A failure means that open_clip or torchvision no longer imports one of them by itself: remove its stand-in."""
    assert imported_by("import open_clip", tmp_path) == dict.fromkeys(LEFT_OUT, True)


def test_open_clip_is_imported_without_them(tmp_path: Path) -> None:
    """A failure means that open_clip or torchvision needs more than a stand-in has: measure, then extend or remove it."""
    lean = "from clipcid_cli.runtime.models.lean_open_clip import open_clip"
    assert imported_by(lean, tmp_path) == dict.fromkeys(LEFT_OUT, False)


def test_they_can_be_imported_afterwards_and_towers_bring_theirs(tmp_path: Path) -> None:
    script = """
import sys
from clipcid_cli.runtime.models.lean_open_clip import import_towers, open_clip
import torch
from torchvision.ops import roi_align

import_towers({"vision_cfg": {}, "text_cfg": {}})
assert open_clip.timm_model.timm is None and open_clip.hf_model.transformers is None
import_towers({"vision_cfg": {"timm_model_name": "test_vit"}, "text_cfg": {}})
assert open_clip.timm_model.timm.__name__ == "timm" and open_clip.hf_model.transformers is None
tower = open_clip.model.TimmModel("test_vit", 8, image_size=160)
assert tower(torch.zeros(1, 3, 160, 160)).shape == (1, 8)
import transformers
assert transformers.CLIPConfig().model_type == "clip"
# What torchvision's operators ask the compiler, once they run on a GPU.
assert sys.modules["torchvision.ops.roi_align"].is_compile_supported("cpu") is True
assert roi_align(torch.ones(1, 1, 4, 4), [torch.tensor([[0.0, 0, 2, 2]])], 1).item() == 1
assert torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(1)).item() == 1
"""
    run_python(script, tmp_path)


def test_what_is_imported_already_stays(tmp_path: Path) -> None:
    script = """
import timm
from clipcid_cli.runtime.models.lean_open_clip import open_clip
assert open_clip.timm_model.timm is timm and open_clip.hf_model.transformers is None
"""
    run_python(script, tmp_path)


@pytest.mark.parametrize("needs", ["import torch._dynamo.config", "import torch\ntorch._dynamo.disable"])
def test_a_release_that_needs_more_is_imported_plainly(needs: str, tmp_path: Path) -> None:
    (tmp_path / "open_clip").mkdir()
    (tmp_path / "open_clip" / "__init__.py").write_text(f"{needs}\nloaded = True\n")
    script = """
from clipcid_cli.runtime.models.lean_open_clip import open_clip
import torch
assert open_clip.loaded and callable(torch._dynamo.disable)
"""
    run_python(script, tmp_path, PYTHONPATH=str(tmp_path))
