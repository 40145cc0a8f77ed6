"""Importing a module without another that it takes along where it can."""

import subprocess
import sys
from pathlib import Path

import pytest

from clipcid_cli.runtime.imports import import_without

USER = "try:\n    import clipcid_test_taken\nexcept ImportError:\n    clipcid_test_taken = None\n"


def test_the_other_is_left_out_and_can_be_imported_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "clipcid_test_user.py").write_text(USER)
    (tmp_path / "clipcid_test_again.py").write_text(USER)
    (tmp_path / "clipcid_test_taken.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    import_without("clipcid_test_user", {"clipcid_test_taken": None})
    assert sys.modules["clipcid_test_user"].clipcid_test_taken is None
    assert "clipcid_test_taken" not in sys.modules

    import clipcid_test_taken  # type: ignore[import-not-found]

    # What is there already stays, and is found.
    import_without("clipcid_test_again", {"clipcid_test_taken": None})
    assert sys.modules["clipcid_test_again"].clipcid_test_taken is clipcid_test_taken
    assert sys.modules["clipcid_test_taken"] is clipcid_test_taken
    for name in ("user", "again", "taken"):
        del sys.modules[f"clipcid_test_{name}"]


def test_a_failing_import_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "clipcid_test_broken.py").write_text("raise RuntimeError('broken')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(RuntimeError, match="broken"):
        import_without("clipcid_test_broken", {"clipcid_test_other": None})
    assert "clipcid_test_other" not in sys.modules


def test_open_clip_comes_without_compiler_and_foreign_towers_and_with_them_when_a_model_asks(tmp_path: Path) -> None:
    script = """
import sys
from clipcid_cli.runtime.imports import import_open_clip, give_towers

import_open_clip()
import open_clip, torch
from torchvision.ops import roi_align

left_out = ("transformers", "timm", "torch._dynamo", "torch._dynamo.utils")
assert not [name for name in left_out if name in sys.modules]
give_towers({"vision_cfg": {}, "text_cfg": {}})
assert open_clip.timm_model.timm is None and open_clip.hf_model.transformers is None
give_towers({"vision_cfg": {"timm_model_name": "test_vit"}, "text_cfg": {}})
assert open_clip.timm_model.timm.__name__ == "timm" and open_clip.hf_model.transformers is None
tower = open_clip.model.TimmModel("test_vit", 8, image_size=160)
assert tower(torch.zeros(1, 3, 160, 160)).shape == (1, 8)
# What torchvision's operators ask the compiler, once they run on a GPU.
assert sys.modules["torchvision.ops.roi_align"].is_compile_supported("cpu") is True
assert roi_align(torch.ones(1, 1, 4, 4), [torch.tensor([[0.0, 0, 2, 2]])], 1).item() == 1
assert torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(1)).item() == 1
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)


def test_the_stand_in_for_the_compiler_gives_way_to_it(tmp_path: Path) -> None:
    (tmp_path / "wants_more.py").write_text("from torch._dynamo.utils import counters\nimport torch._dynamo\n")
    script = """
import torch
from clipcid_cli.runtime.imports import _COMPILER, _Compiler, import_without

import_without("wants_more", {name: _Compiler(name) for name in _COMPILER})
import wants_more
assert wants_more.counters is torch._dynamo.utils.counters
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)


def test_a_version_that_needs_more_of_the_compiler_is_imported_plainly(tmp_path: Path) -> None:
    script = """
import sys, types
from clipcid_cli.runtime import imports

tried = []
plain = imports.import_without
def fails_first(module, stand_ins):
    sys.modules.update(stand_ins)
    try:
        tried.append(module)
        import torch._dynamo.config  # a submodule of what only stands in
    finally:
        for name in stand_ins:
            sys.modules.pop(name, None)
imports.import_without = fails_first
imports.import_open_clip()
import open_clip
assert tried == ["open_clip"] and open_clip.timm_model.timm is not None
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, cwd=tmp_path)
