"""Losses from the user's own files: typed in this run, and so run; never because an output names them."""

from __future__ import annotations

import functools
import sys
import traceback
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from clipcid_cli.errors import ClipcidError, in_one_line
from clipcid_cli.formats.loss_file import LossFile

_CONTRACT = "Return the sum over the rows batch.own, divided by len(batch): docs/distill.md#a-loss-of-your-own"


@functools.lru_cache
def load_own_loss(file: LossFile) -> Callable[..., Tensor]:
    """Run the source that was read, and return its function, whose errors and results are checked at each call."""
    module = types.ModuleType(f"clipcid_loss_{file.hash[-12:]}")
    module.__file__ = file.path
    sys.modules[module.__name__] = module  # where dataclasses of the file look for their types
    try:
        # The file that the user named in this run: sidecars record its hash, and never lead here.
        exec(compile(file.source, file.path, "exec"), module.__dict__)
    except Exception as error:
        raise _failed(file, error, "cannot be loaded", f"Correct {file.path}.") from error
    function = getattr(module, file.name)

    def compute(*batch: Any, **learned: Any) -> Tensor:
        try:
            value = function(*batch, **learned)
        except (ClipcidError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise _failed(file, error, "failed", f"Correct {file.path}, or omit the loss.") from error
        if not isinstance(value, Tensor) or value.ndim or not value.is_floating_point():
            what = type(value).__name__
            if isinstance(value, Tensor):
                what = f"a tensor of {str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
            raise ClipcidError(
                f"The loss {file.name} of {file.path} returned {what}, not a tensor of one floating-point number.",
                _CONTRACT,
            )
        if not value.requires_grad:
            raise ClipcidError(f"The loss {file.name} of {file.path} does not depend on the student.", _CONTRACT)
        return value

    return compute


def _failed(file: LossFile, error: Exception, what: str, fix: str) -> ClipcidError:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file.path]
    where = f", line {lines[-1]}" if lines else ""
    return ClipcidError(
        f"The loss {file.name} of {file.path} {what}{where}: {type(error).__name__}: {in_one_line(error)}.".replace(
            "..", "."
        ),
        fix,
    )
