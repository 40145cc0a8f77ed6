"""Command lines run in one process, on the simulated device or, in tests marked ``gpu``, on a real one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import clean_environment

KINDS = ("simulated", pytest.param("real", marks=pytest.mark.gpu))


def start(kind: str, place: Path, commands: Sequence[Sequence[object]], **options: Any) -> subprocess.Popen[str]:
    """Start to run command lines one after another in `place`.

    Args:
        kind: ``simulated`` or ``real``.
    """
    if kind == "simulated" and shutil.which("g++") is None:
        pytest.skip("no g++, which compiles the simulated device")
    if kind == "simulated" and torch.version.cuda is not None:
        pytest.skip("the simulated device takes CUDA's place in a PyTorch that is built without it")
    lines = json.dumps([[str(word) for word in command] for command in commands])
    environment = clean_environment() | {"CLIPCID_WORKERS": "0", "OMP_NUM_THREADS": "1"}
    environment |= {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}  # as in common containers
    command = [sys.executable, str(Path(__file__).with_name("run.py")), kind, lines]
    return subprocess.Popen(command, cwd=place, env=environment, text=True, **options)


def run_all(kind: str, place: Path, commands: Sequence[Sequence[object]]) -> list[dict[str, Any]]:
    """Run command lines to their end; each must succeed. Return what each did."""
    process = start(kind, place, commands, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    results: list[dict[str, Any]] = [json.loads(line) for line in stdout.splitlines()]
    for result in results:
        assert result["exit"] == 0, f"{' '.join(result['command'])}\n{result['stderr']}"
    assert len(results) == len(commands)
    return results


def total(counts: dict[str, int]) -> int:
    """Sum a result's operators, or waits."""
    return sum(counts.values())
