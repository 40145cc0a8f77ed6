"""open_clip, imported without transformers and timm, which few models need: ``from …lean_open_clip import open_clip``.

open_clip imports both where they are installed. `eval-zeroshot` on 32 images took 3.2 s with them and 2.6 s without, `embed`
with a worker 4.4 and 3.7 s (2 cores, open_clip 3.3, transformers 5.24, timm 1.0).
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from typing import Any

from clipcid_cli.runtime.libraries import importing

__all__ = ["import_towers", "open_clip"]

# None is Python's own mark of a module that cannot be imported.
_left_out = dict.fromkeys({"transformers", "timm"} - sys.modules.keys())
sys.modules.update(_left_out)  # type: ignore[arg-type]  # its type does not include None
try:
    with importing():
        import open_clip
finally:
    for name in _left_out:
        del sys.modules[name]


def import_towers(config: Mapping[str, Any]) -> None:
    """Import transformers or timm into open_clip for an architecture that has a tower of theirs.

    Whoever builds such a model with open_clip itself in this process calls this first.
    """
    for owner, library, tower in (
        ("open_clip.hf_model", "transformers", config["text_cfg"].get("hf_model_name")),
        ("open_clip.timm_model", "timm", config["vision_cfg"].get("timm_model_name")),
    ):
        module = importlib.import_module(owner)
        if tower and getattr(module, library) is None:
            # Classes defined before look names up in their module when they are used, so they find the library now.
            importlib.reload(module)
