"""Freed memory stays with the process."""

import ctypes
import subprocess
import sys

import pytest

# Pages the system had to supply for twenty tensors' worth of memory, taken and freed one after another.
PROGRAM = """
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


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library has no such setting")
def test_freed_memory_is_taken_again() -> None:
    def pages(how: str) -> int:
        command = [sys.executable, "-c", PROGRAM, how]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert pages("keep") < pages("leave") / 20
