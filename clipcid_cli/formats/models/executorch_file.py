"""ExecuTorch programs, ``.pte``: PyTorch modules for the processors of phones, compiled by XNNPACK for a batch of one."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clipcid_cli.errors import ClipcidError, in_one_line
from clipcid_cli.formats.files import write_bytes


class _TanhGelu(nn.Module):
    """GELU in its tanh form, ½(1 + tanh z) written as the sigmoid of 2z: XNNPACK's own operator errs by up to 5e-4."""

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        twice_z = 2 * math.sqrt(2 / math.pi) * (given + 0.044715 * given * given * given)
        return given * torch.sigmoid(twice_z)


class _InHalf(nn.Module):
    """A tower that computes in 16 bits, from and to 32; its unit rows are of unit length after rounding, too."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower.half()

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        rows = self.tower(given.half() if given.is_floating_point() else given)
        return nn.functional.normalize(rows.float(), dim=-1)


def write_program(path: Path, tower: nn.Module, example: torch.Tensor, kind: str) -> None:
    """Write a tower, in evaluation mode on the CPU, as a program that takes one row as `example` is, and gives a unit row.

    Args:
        kind: ``fp32``. ``fp16``: weights, and all that is computed of them, in 16 bits. ``int8``: weights of matrix products
            in 8 bits, one scale per column, the other factor quantized at run time; embedding tables in 16 bits.
    """
    try:
        program = _compile(_with_exact_gelu(copy.deepcopy(tower)), example, kind)
    except (ImportError, OSError) as error:
        raise ClipcidError(
            f"--format executorch: ExecuTorch does not load beside PyTorch {torch.__version__}: {in_one_line(error)}",
            "Install the extra in an environment of its own, where pip chooses what fits: pip install '.[executorch]'",
        ) from error
    except Exception as error:  # torch.export and ExecuTorch raise many kinds for what they cannot express
        raise ClipcidError(
            f"{path.name}: ExecuTorch cannot express this model in {kind}: {in_one_line(error)}",
            "Omit this number format, or export with --format onnx --static; --debug shows where it stopped.",
        ) from error
    write_bytes(path, program)


def _with_exact_gelu(tower: nn.Module) -> nn.Module:
    for parent in [*tower.modules()]:
        for name, child in parent.named_children():
            # PyTorch's module, or timm's.
            if getattr(child, "approximate", "") == "tanh" or type(child).__name__ == "GELUTanh":
                setattr(parent, name, _TanhGelu())
    return tower


def _compile(tower: nn.Module, example: torch.Tensor, kind: str) -> bytes:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    if kind == "fp16":
        tower = _InHalf(tower).eval()
    elif kind == "int8":
        tower = _quantize(tower, example)
    exported = torch.export.export(tower, (example,))
    return bytes(to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()]).to_executorch().buffer)


def _quantize(tower: nn.Module, example: torch.Tensor) -> nn.Module:
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    for table in tower.modules():
        if isinstance(table, nn.Embedding):
            table.half().register_forward_hook(_widen)
    settings = xnnpack_quantizer.get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)
    quantizer = xnnpack_quantizer.XNNPACKQuantizer().set_global(settings)
    prepared = prepare_pt2e(torch.export.export(tower, (example,)).module(), quantizer)
    with torch.no_grad():
        prepared(example)  # which shows the shapes; scales of what is multiplied are found at run time
    return convert_pt2e(prepared)  # type: ignore[no-any-return]


def _widen(table: nn.Module, given: Any, rows: torch.Tensor) -> torch.Tensor:
    return rows.float()
