"""open_clip, imported without what few models need: ``from …lean_open_clip import open_clip``.

open_clip imports transformers and timm where they are installed, which only models with such a tower use, and torchvision
imports PyTorch's compiler for one function that its operators call on a GPU. While open_clip is imported, stand-ins in
``sys.modules`` keep them out; afterwards each can be imported as usual. Wall time in seconds, median of five alternating
runs (2 cores, PyTorch 2.13, open_clip 3.3, transformers 5.24, timm 1.0):

                                  everything   without transformers, timm   without the compiler either
    eval-zeroshot, 32 images            3.20                         2.57                          2.00
    embed, 32 images, one worker        4.36                         3.72                          2.94
    a worker's first batch              4.09                         3.32                          2.77

Tests of this module fail once open_clip leaves one of them out by itself, or needs more of it than a stand-in has. The
server that workers are forked from imports this module (see `runtime.pipeline`).
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch  # noqa: F401  # whole, before a part of it is left out

from clipcid_cli.runtime.imports import importing

__all__ = ["import_towers", "open_clip"]


def import_towers(config: Mapping[str, Any]) -> None:
    """Import transformers or timm into open_clip for an architecture that has a tower of theirs.

    Whoever builds such a model with open_clip itself in this process calls this first.

    Args:
        config: open_clip's model configuration, with ``vision_cfg`` and ``text_cfg``.
    """
    for owner, library, tower in (
        ("open_clip.hf_model", "transformers", config["text_cfg"].get("hf_model_name")),
        ("open_clip.timm_model", "timm", config["vision_cfg"].get("timm_model_name")),
    ):
        module = importlib.import_module(owner)
        if tower and getattr(module, library) is None:
            # Classes defined before look names up in their module when they are used, so they find the library now.
            importlib.reload(module)


@contextmanager
def _left_out() -> Iterator[None]:
    """Put stand-ins in the places of modules that are not imported yet, and take them away again."""
    utils = ModuleType("torch._dynamo.utils")
    utils.is_compile_supported = _is_compile_supported  # type: ignore[attr-defined]  # of a stand-in, made here
    # None is Python's own mark of a module that cannot be imported.
    stand_ins = {
        "transformers": None,
        "timm": None,
        "torch._dynamo": ModuleType("torch._dynamo"),
        utils.__name__: utils,
    }
    placed = {name: stand_in for name, stand_in in stand_ins.items() if name not in sys.modules}
    sys.modules.update(placed)  # type: ignore[arg-type]  # its type does not include None
    try:
        yield
    finally:
        for name in placed:
            del sys.modules[name]


def _is_compile_supported(device_type: str) -> bool:
    """Ask the real function, when one of torchvision's operators does."""
    from torch._dynamo.utils import is_compile_supported

    return bool(is_compile_supported(device_type))


try:
    with importing(), _left_out():
        import open_clip
except (ImportError, AttributeError):  # a release that needs more of one of them while it is imported
    with importing():
        import open_clip
