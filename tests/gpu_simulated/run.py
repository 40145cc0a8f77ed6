"""Run command lines of clipcid, or ``-c`` and Python code, in one process; print what each did as a line of JSON.

python tests/gpu_simulated/run.py simulated '[["embed", "shards", "--device", "cuda"], …]'
python tests/gpu_simulated/run.py real '[["embed", "shards", "--device", "cuda"], …]'
"""

from __future__ import annotations

import io
import json
import os
import sys
from contextlib import nullcontext, redirect_stderr, redirect_stdout

from stub import load

if sys.argv[1] == "simulated":
    load()

from device import SimulatedCuda, simulated_cuda  # PyTorch must find the device when it starts

from clipcid_cli import cli


def run(command: list[str], device: SimulatedCuda) -> dict[str, object]:
    """Run one command line: its exit status, its output, and what it cost the device."""
    device.operators.clear()
    device.waits.clear()
    device.inexact.clear()
    device.prefetched.clear()
    device.prefetch_waits.clear()
    stdout, stderr, code = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(stdout), redirect_stderr(stderr):
        try:
            if command[0] == "-c":
                exec(command[1], {})
            else:
                code = cli.run(command)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
    return {
        "command": command,
        "exit": code,
        "stdout": stdout.getvalue(),
        "stderr": stderr.getvalue(),
        "operators": dict(device.operators),
        "waits": dict(device.waits),
        "inexact": dict(device.inexact),
        "prefetched": dict(device.prefetched),
        "prefetch_waits": dict(device.prefetch_waits),
    }


if __name__ == "__main__":
    kind, commands = sys.argv[1:]
    with simulated_cuda() if kind == "simulated" else nullcontext(SimulatedCuda()) as counters:
        for line in json.loads(commands):
            print(json.dumps(run(line, counters)), flush=True)
    os._exit(0)  # PyTorch's own end would ask the device that is not there
