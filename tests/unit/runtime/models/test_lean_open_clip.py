"""What is kept out while open_clip is imported, and how it comes in when a model needs it."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys
from clipcid_cli.runtime.models.lean_open_clip import import_towers, open_clip
import torch
from torchvision.ops import roi_align

assert not {"timm", "transformers", "torch._dynamo", "torch._dynamo.utils"} & sys.modules.keys()
import_towers({"vision_cfg": {}, "text_cfg": {}})
assert open_clip.timm_model.timm is None and open_clip.hf_model.transformers is None
import_towers({"vision_cfg": {"timm_model_name": "test_vit"}, "text_cfg": {}})
assert open_clip.timm_model.timm.__name__ == "timm" and open_clip.hf_model.transformers is None
tower = open_clip.model.TimmModel("test_vit", 8, image_size=160)
assert tower(torch.zeros(1, 3, 160, 160)).shape == (1, 8)
import_towers({"vision_cfg": {}, "text_cfg": {"hf_model_name": "a name"}})
assert open_clip.hf_model.transformers.CLIPConfig().model_type == "clip"
# What torchvision's operators ask the compiler, once they run on a GPU.
assert sys.modules["torchvision.ops.roi_align"].is_compile_supported("cpu") is True
assert roi_align(torch.ones(1, 1, 4, 4), [torch.tensor([[0.0, 0, 2, 2]])], 1).item() == 1
assert torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(1)).item() == 1
"""


def test_what_open_clip_imports_comes_when_it_is_needed() -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", SCRIPT], check=True)
