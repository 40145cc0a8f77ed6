"""How exactly a GPU adds up the products of a matrix product."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def exact_accumulation(device: torch.device) -> Iterator[None]:
    """Keep GPUs from adding up partial products in less than float32, and from rounding their factors to TF32.

    Bounds on a product's error rely on it, and so do differences of nearly equal sums, whatever the process was started with
    (``TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1`` is set in common containers).
    """
    if device.type != "cuda":
        yield
        return
    matmul = torch.backends.cuda.matmul
    names = (
        *("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction"),
        *("allow_fp16_accumulation", "allow_tf32"),
    )
    before = {name: getattr(matmul, name) for name in names}
    try:
        for name in names:
            setattr(matmul, name, False)
        yield
    finally:
        for name, value in before.items():
            setattr(matmul, name, value)
