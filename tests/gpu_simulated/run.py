"""Run command lines of clipcid, or ``-c`` and Python code, in one process; print what each did as a line of JSON.

python tests/gpu_simulated/run.py simulated|real '[["embed", "shards", "--device", "cuda"], …]'
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

COUNTS = ("operators", "waits", "late_waits", "inexact", "prefetched", "prefetch_waits")


def run(command: list[str], device: SimulatedCuda) -> dict[str, object]:
    """Run one command line: its exit status, its output, and what it cost the device."""
    for name in COUNTS:
        getattr(device, name).clear()
    stdout, stderr, code = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(stdout), redirect_stderr(stderr):
        try:
            if command[0] == "-c":
                exec(command[1], {})
            else:
                code = cli.run(command)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
    told = {"command": command, "exit": code, "stdout": stdout.getvalue(), "stderr": stderr.getvalue()}
    return told | {name: dict(getattr(device, name)) for name in COUNTS}


if __name__ == "__main__":
    kind, commands = sys.argv[1:]
    with simulated_cuda() if kind == "simulated" else nullcontext(SimulatedCuda()) as counters:
        for line in json.loads(commands):
            print(json.dumps(run(line, counters)), flush=True)
    os._exit(0)  # PyTorch's own end would ask the device that is not there
