"""The package as the runners of tests see it: all its modules, whatever they are called."""

from __future__ import annotations

import gc
import importlib
import pkgutil
import sys


def import_package() -> None:
    """Import every module, so that a command line in a fork of this process waits for none.

    Garbage is not collected meanwhile: imports make 400,000 objects and keep them all.
    """
    import clipcid_cli

    gc.disable()
    for module in pkgutil.walk_packages(clipcid_cli.__path__, "clipcid_cli."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    gc.freeze()
    gc.enable()


def forget_files() -> None:
    """Clear what the modules remember of files by their names: in the next folder another file may have the name."""
    for name, module in list(sys.modules.items()):
        if name.startswith("clipcid_cli."):
            for value in list(vars(module).values()):
                if callable(clear := getattr(value, "cache_clear", None)):
                    clear()
