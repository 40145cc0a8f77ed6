"""The number format each purpose gets."""

from __future__ import annotations

import pytest
import torch

from clipcid_cli.errors import ClipcidError
from clipcid_cli.runtime import precision
from clipcid_cli.runtime.precision import choose_coarse_dtype, choose_precision, has_amx

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_auto() -> None:
    fast = "bf16" if has_amx() else "fp32"
    assert choose_precision("auto", CPU, "evaluate", 10**9).name == "fp32"
    assert choose_precision("auto", CUDA, "evaluate", 10**9).name == "fp32"
    assert choose_precision("auto", CPU, "embed", 10**6).name == fast
    assert choose_precision("auto", CPU, "train", 10**6).name == "fp32"
    assert choose_precision("auto", CPU, "train", 10**8).name == fast
    assert choose_precision("auto", CUDA, "embed", 10**6).name == "fp16"
    assert choose_precision("auto", CUDA, "train", 10**6).name == "bf16"


def test_near_pairs_are_looked_for_in_what_is_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(*flags: str) -> str:
        monkeypatch.setattr(precision, "_cpu_flags", lambda: frozenset(flags))
        return choose_coarse_dtype("auto", CPU).name

    assert found("avx512_vnni", "amx_bf16") == "bf16"
    assert found("avx512_vnni") == "int8"
    assert found("avx2") == "fp32"
    assert choose_coarse_dtype("auto", CUDA).name == "fp16"
    assert choose_coarse_dtype("fp32", CPU).name == "fp32"


def test_asked_for() -> None:
    assert choose_precision("bf16", CPU, "evaluate", 0).dtype == torch.bfloat16
    with pytest.raises(ClipcidError, match="needs a GPU"):
        choose_precision("fp16", CPU, "embed", 0)
