"""Command lines run on the simulated device, in one process."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import clean_environment

RUN = Path(__file__).with_name("run.py")


def simulate(place: Path, commands: Sequence[Sequence[object]]) -> list[dict[str, Any]]:
    """Run command lines one after another in `place`; each must succeed. Return what each did."""
    if shutil.which("g++") is None:
        pytest.skip("no g++, which compiles the simulated device")
    lines = json.dumps([[str(word) for word in command] for command in commands])
    environment = clean_environment() | {"CLIPCID_WORKERS": "0", "OMP_NUM_THREADS": "1"}
    environment |= {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}  # as in common containers
    done = subprocess.run(
        [sys.executable, str(RUN), lines],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    for result in results:
        assert result["exit"] == 0, f"{' '.join(result['command'])}\n{result['stderr']}"
    assert len(results) == len(commands)
    return results


def total(counts: dict[str, int]) -> int:
    """Sum a result's operators, or waits."""
    return sum(counts.values())
