"""OpenMP's threads do not spin beside busy programs, unless the user says so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_PROGRAM = """
import os
from clipcid_cli.runtime.libraries import set_openmp_spins
set_openmp_spins("10000")
print(os.environ["GOMP_SPINCOUNT"])
"""


def spins(**environment: str) -> str:
    own = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"} | environment
    return subprocess.run(
        [sys.executable, "-c", _PROGRAM], env=own, capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.mark.skipif(not Path("/proc/loadavg").exists(), reason="the system does not count its running threads so")
def test_threads_do_not_spin_beside_busy_programs() -> None:
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * (os.cpu_count() or 1))]
    try:
        assert spins() == "0"
        assert spins(GOMP_SPINCOUNT="5") == "5"
    finally:
        for other in others:
            other.kill()
            other.wait()
