"""open_clip, imported without what few models need, and kept from running code of a model.

open_clip imports transformers and timm where they are installed, and torchvision imports PyTorch's compiler for one function
that its operators call on a GPU. `eval-zeroshot` on 32 images took 3.2 s with all, 2.6 s without transformers and timm and
2.0 s without the compiler either; `embed` with a worker 4.4, 3.7 and 2.9 s (2 cores, open_clip 3.3, transformers 5.24, timm
1.0, PyTorch 2.13).
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import torch  # noqa: F401  # whole, before a part of it is left out

from clipcid_cli.runtime.libraries import importing

__all__ = ["import_towers", "open_clip"]


def _is_compile_supported(device_type: str) -> bool:
    from torch._dynamo.utils import is_compile_supported

    return bool(is_compile_supported(device_type))


@contextmanager
def _left_out() -> Iterator[None]:
    """Put stand-ins in the places of modules that are not imported yet, and take them away again."""
    stand_ins: dict[str, Any] = {
        # None is Python's own mark of a module that cannot be imported.
        "transformers": None,
        "timm": None,
        "torch._dynamo": ModuleType("torch._dynamo"),
        "torch._dynamo.utils": SimpleNamespace(is_compile_supported=_is_compile_supported),
    }
    placed = {name: stand_in for name, stand_in in stand_ins.items() if name not in sys.modules}
    sys.modules.update(placed)
    try:
        yield
    finally:
        for name in placed:
            del sys.modules[name]


try:
    with importing(), _left_out():
        import open_clip
except (ImportError, AttributeError):  # more of one of them is needed, as by a device that is a plug-in of PyTorch
    with importing():
        import open_clip


def import_towers(config: Mapping[str, Any]) -> None:
    """Import transformers or timm into open_clip, before it builds an architecture that has a tower of theirs."""
    for owner, library, tower in (
        ("open_clip.hf_model", "transformers", config["text_cfg"].get("hf_model_name")),
        ("open_clip.timm_model", "timm", config["vision_cfg"].get("timm_model_name")),
    ):
        module = importlib.import_module(owner)  # of the table above: a configuration's names are never imported
        if tower and getattr(module, library) is None:
            # Classes defined before look names up in their module when they are used, so they find the library now.
            importlib.reload(module)
    hf_model: Any = importlib.import_module("open_clip.hf_model")
    for auto in ("AutoConfig", "AutoModel"):
        if hf_model.transformers is not None and not isinstance(getattr(hf_model, auto), _WithoutCode):
            setattr(hf_model, auto, _WithoutCode(getattr(hf_model, auto)))


class _WithoutCode:
    """One of transformers' automatic classes that neither runs code of a model nor asks at the terminal whether it may."""

    def __init__(self, auto: Any) -> None:
        self.from_pretrained = partial(auto.from_pretrained, trust_remote_code=False)
        if hasattr(auto, "from_config"):
            self.from_config = partial(auto.from_config, trust_remote_code=False)
