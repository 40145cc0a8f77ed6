"""A host of a run of several that dies: its torchrun and all it started. Two hosts are two agents on one machine."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time

from fault_place import Result, Site, Step, read_tree
from fault_processes import children_of
from one_process import Outcome

_BY_HOSTS = ("embed", "balance", "cluster", "distill")
_PATIENCE = 300.0
"""Seconds in which two hosts start, and the one that is left ends, on a busy machine."""


def list_host_kills(site: Site, step: Step, chance: random.Random) -> list[tuple[int, float]]:
    """The host that dies, and how many seconds after the first file was written; the first one holds the meeting place."""
    return [(0, chance.uniform(0, 0.3)), (1, chance.uniform(0, 0.3))] if step.name in _BY_HOSTS else []


def run_host_kill(site: Site, step: Step, case: tuple[int, float]) -> Result:
    """Kill one of two hosts; the other must end by itself and say so. Then give the command again to both."""
    host, delay = case
    if (name := f"{step.name} by two hosts") not in site.expected:
        whole = _run_hosts(site, step)
        assert [found.code for found in whole] == [0, 0], whole
        site.expected[name] = read_tree(site.place)
        site.reset(step)
    found = _run_hosts(site, step, host, delay)
    left, problems = found[1 - host], []
    if reached := found[host].code == -signal.SIGKILL and left.code != 0:
        if left.code != 1:
            problems.append(f"exit {left.code}")
        if "Another process of the run has ended" not in left.err:
            problems.append("it does not say that a process has ended")
        problems += ["it calls it a bug"] if "bug in clipcid" in left.err else []
        problems += site.find_half(step, name)
    again = _run_hosts(site, step)
    problems += [f"given again: exit {outcome.code}{outcome!r}" for outcome in again if outcome.code != 0]
    problems += site.compare(step, name)
    return Result(left.code, [*problems, repr(found)] if problems else [], reached)


def _run_hosts(site: Site, step: Step, killed: int | None = None, delay: float = 0.0) -> list[Outcome]:
    """Run a step by two hosts, one of them killed some seconds after the first file was written."""
    before = set(site.place.rglob("*"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    agents = []
    for host in range(2):
        places = ("--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(host))
        meeting = ("--master-addr", "127.0.0.1", "--master-port", port)
        command = [sys.executable, "-m", "torch.distributed.run", *places, *meeting, "-m", "clipcid_cli", *step.command]
        agents.append(
            subprocess.Popen(
                command,
                cwd=site.place,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    if killed is not None:
        deadline = time.monotonic() + _PATIENCE
        while before.issuperset(site.place.rglob("*")) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(delay)
        _kill(agents[killed])
    outcomes = []
    for agent in agents:
        try:
            out, err = agent.communicate(timeout=_PATIENCE)
        except subprocess.TimeoutExpired:
            _kill(agent)
            outcomes.append(Outcome(step.command, None, *agent.communicate()))
        else:
            outcomes.append(Outcome(step.command, agent.returncode, out, err))
    return outcomes


def _kill(agent: subprocess.Popen[str]) -> None:
    """Kill an agent and the processes that it has started, which would outlive it."""
    for process in (agent.pid, *children_of(agent.pid)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
