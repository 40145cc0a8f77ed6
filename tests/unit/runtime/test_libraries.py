"""What libraries are told of the machine: OpenMP's threads do not spin beside busy programs, freed memory stays."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

_SPINS = """
import os
from clipcid_cli.runtime.libraries import set_openmp_spins
set_openmp_spins("10000")
print(os.environ["GOMP_SPINCOUNT"])
"""

# Pages the system had to supply for twenty tensors' worth of memory, taken and freed one after another.
_PAGES = """
import resource, sys
import numpy as np
if sys.argv[1] == "keep":
    from clipcid_cli.runtime.libraries import keep_freed_memory
    keep_freed_memory()
np.ones(8_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    np.ones(8_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(program: str, *arguments: str, **environment: str) -> int:
    own = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"} | environment
    command = [sys.executable, "-c", program, *arguments]
    return int(subprocess.run(command, env=own, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(not Path("/proc/loadavg").exists(), reason="the system does not count its running threads so")
def test_threads_do_not_spin_beside_busy_programs_unless_the_user_says_so() -> None:
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * (os.cpu_count() or 1))]
    try:
        assert run(_SPINS) == 0
        assert run(_SPINS, GOMP_SPINCOUNT="5") == 5
    finally:
        for other in others:
            other.kill()
            other.wait()


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library has no such setting")
def test_freed_memory_is_taken_again() -> None:
    assert run(_PAGES, "keep") < run(_PAGES, "leave") / 20
