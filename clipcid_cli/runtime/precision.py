"""The number format of the heavy arithmetic, chosen once, with the reason."""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Literal, cast

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from clipcid_cli.errors import ClipcidError

Purpose = Literal["embed", "train", "evaluate"]


@dataclasses.dataclass(frozen=True)
class Precision:
    """The number format of matrix products; weights and stored results keep their own."""

    name: str  # fp32, bf16 or fp16; also int8 in the search for near pairs
    reason: str  # why it was chosen, for the user

    @property
    def dtype(self) -> torch.dtype:
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}[self.name]

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """Return PyTorch's autocast to this format; for fp32 a context without effect."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(device.type, dtype=self.dtype)


# Measured on 2 cores of a Xeon with AMX. Embedding, weights cast once: 334 → 1,120 images/s at 10.8 M parameters, 33 → 151
# for ViT-B-32, no change at 3.4 M. Training steps, weights cast each step: 0.76 × the speed of fp32 at 3.4 M parameters,
# 1.27 × at 10.8 M, 1.47 × for ViT-B-32.
_LEAST_TO_TRAIN = 8_000_000


def choose_precision(requested: str, device: torch.device, purpose: Purpose, parameters: int) -> Precision:
    """Choose the number format of a step: what is requested, ``fp32``, ``bf16`` or ``fp16``, or with ``auto`` the fastest.

    That is fp32 in evaluation; on a GPU fp16 to embed (rows are stored in it) and bf16 to train; on a CPU with tile units
    (AMX) bf16, to train only if the model is large enough to gain.
    """
    if requested == "fp16" and device.type == "cpu":
        raise ClipcidError("--precision fp16 needs a GPU.", "Use --precision bf16 or fp32 on a CPU.")
    if requested != "auto":
        return Precision(requested, "requested")
    if purpose == "evaluate":
        return Precision("fp32", "evaluation uses full precision")
    if device.type == "cuda":
        return Precision("fp16", "rows are stored in it") if purpose == "embed" else Precision("bf16", "GPU")
    if not has_amx():
        return Precision("fp32", "this CPU has no bf16 tile units (AMX)")
    if purpose == "train" and parameters < _LEAST_TO_TRAIN:
        return Precision("fp32", f"{parameters / 1e6:.1f} M parameters are too few to gain from bf16 on a CPU")
    return Precision("bf16", "this CPU has bf16 tile units (AMX)")


def choose_coarse_dtype(requested: str, device: torch.device) -> Precision:
    """Choose the format of the search for near pairs, as for embedding, but int8 on CPUs with AVX-512 VNNI without AMX.

    The result is the same in each. Measured on 2 cores of such a Xeon, products of 2,048 × 512 by 512 × 2,048, in 10⁹
    operations per second: fp32 386, bf16 178, int8 1,480.
    """
    if requested == "auto" and device.type == "cpu" and not has_amx() and "avx512_vnni" in _cpu_flags():
        return Precision("int8", "this CPU has int8 dot products (AVX-512 VNNI)")
    return choose_precision(requested, device, "embed", parameters=0)


def fast_attention(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """Choose the attention kernel of the forward pass, which decides that of the backward pass.

    On a CPU the backward pass of PyTorch's fused attention in bfloat16 is slow: with 2 cores with AMX, 128 samples and a
    13.7 M CLIP at 64 px, a training step took 276 ms with it and 195 ms with plain matrix products (379 ms in float32).
    """
    if device.type == "cpu" and dtype == torch.bfloat16:
        return cast(AbstractContextManager[None], sdpa_kernel(SDPBackend.MATH))
    return nullcontext()


def has_amx() -> bool:
    """Tell whether this machine's CPU multiplies bf16 tiles in hardware."""
    return "amx_bf16" in _cpu_flags()


@cache
def _cpu_flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    for line in lines:
        if line.startswith("flags"):
            return frozenset(line.split())
    return frozenset()
