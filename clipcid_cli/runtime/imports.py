"""Importing libraries of many modules faster, and leaving them behind faster."""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any


@contextmanager
def importing() -> Iterator[None]:
    """Look for no garbage while what is inside imports, nor ever again in what it made.

    Imports make 400,000 objects and keep them all. Python would go through them again and again, last when it exits: a
    program that only imports open_clip took 3.1 s of CPU this way, 4.2 s when they were not set aside at the end, and
    searching while importing costs 0.7 s more.
    """
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if before:
            gc.enable()


def import_open_clip() -> None:
    """Import open_clip as it is where transformers and timm are not installed, and without PyTorch's compiler.

    Few models need the first two: `give_towers` imports them for those that do, and is to be called by whoever builds such
    models with open_clip itself in the same process. The compiler torchvision imports for one function of its operators,
    which no model here calls. Together they are 2.5 of the 3.0 s of CPU that importing open_clip takes (AMD EPYC), in every
    command that loads a model and in the server its workers are forked from. No other thread may import meanwhile.
    """
    stand_ins = {"transformers": None, "timm": None} | {name: _Compiler(name) for name in _COMPILER}
    try:
        import_without("open_clip", stand_ins)
    except (ImportError, RecursionError):
        # Some version needs more of one of them while it is imported.
        with importing():
            importlib.import_module("open_clip")


def give_towers(config: Mapping[str, Any]) -> None:
    """Let open_clip build the towers of an architecture: import what `import_open_clip` left out and it needs.

    Args:
        config: open_clip's model configuration, with ``vision_cfg`` and ``text_cfg``.
    """
    for owner, library, wanted in (
        ("open_clip.hf_model", "transformers", config["text_cfg"].get("hf_model_name")),
        ("open_clip.timm_model", "timm", config["vision_cfg"].get("timm_model_name")),
    ):
        module = importlib.import_module(owner)
        if wanted and getattr(module, library) is None:
            # Classes made before look names up in their module when they are used, so they find the library now.
            importlib.reload(module)


def import_without(module: str, stand_ins: Mapping[str, ModuleType | None]) -> None:
    """Import a module for the first time with others taking the places of what it imports.

    Args:
        stand_ins: For each module that it is to do without, what it finds instead (None: it is not installed). A module
            that has been imported already stays where it is; the others can be imported afterwards.
    """
    if module in sys.modules:
        return
    # None is Python's own way to say that a module cannot be imported.
    placed = {name: stand_in for name, stand_in in stand_ins.items() if name not in sys.modules}
    sys.modules.update(placed)  # type: ignore[arg-type]  # its type leaves None out
    try:
        with importing():
            importlib.import_module(module)
    finally:
        for name, stand_in in placed.items():
            if name in sys.modules and sys.modules[name] is stand_in:
                del sys.modules[name]


_COMPILER = ("torch._dynamo", "torch._dynamo.utils")


class _Compiler(ModuleType):
    """Stands for a module of PyTorch's compiler: has the function that torchvision takes; asked for more, it gives way."""

    @staticmethod
    def is_compile_supported(device_type: str) -> bool:
        _Compiler.give_way()
        from torch._dynamo.utils import is_compile_supported

        return bool(is_compile_supported(device_type))

    @staticmethod
    def give_way() -> None:
        for module in _COMPILER:
            if isinstance(sys.modules.get(module), _Compiler):
                del sys.modules[module]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        _Compiler.give_way()
        return getattr(importlib.import_module(self.__name__), name)
