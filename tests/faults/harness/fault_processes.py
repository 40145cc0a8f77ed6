"""Processes of one run that die: a rank or a host of two, or a process that decodes images.

Two hosts are two agents of torchrun on one machine.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from conftest import Run, free_port
from fault_child import count_operations, read_operations
from fault_place import Result, Site, Step, read_tree

_DECODING = ("embed", "distill", "eval-zeroshot", "eval-linear")
_BY_RANKS = ("embed", "balance", "balance, partitioned", "balance, new shards", "cluster", "distill")
_BY_HOSTS = ("embed", "balance", "cluster", "distill")
_PATIENCE = 300.0
"""Seconds in which two hosts start, and the one that is left ends, on a busy machine."""


def list_rank_kills(site: Site, step: Step, chance: random.Random) -> list[tuple[int, float]]:
    """The rank that dies, and after which part of its file operations; rank 0 writes most files."""
    if step.name not in _BY_RANKS:
        return []
    return [(rank, chance.random()) for rank in (0, 0, 1, 0, 0, 1, 0, 0, 1)]


def run_rank_kill(site: Site, step: Step, case: tuple[int, float]) -> Result:
    """Kill one of two ranks; the other must end by itself and say so. Then give the command again to both."""
    rank, part = case
    name = f"{step.name} by two"

    def run(killed: int | None = None, number: int = 0) -> list[Run]:
        world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "LOCAL_WORLD_SIZE": "2"}
        ranks = []
        for each in range(2):
            hook = functools.partial(count_operations, _log_of(site, each), number if each == killed else None)
            ranks.append(site.start(step, hook, **world, RANK=str(each), LOCAL_RANK=str(each)))
        return [site.finish(step, rank, 30) for rank in ranks]

    if name not in site.expected:
        _expect(site, step, name, run)
        for each in range(2):
            site.operations[f"{name}, rank {each}"] = read_operations(_log_of(site, each))
    operations = site.operations[f"{name}, rank {rank}"]
    if not operations:
        return Result(None, [], False)
    found = run(rank, int(part * len(operations)))
    return _judge(site, step, name, found, rank, found[1 - rank].problems(), run)


def list_host_kills(site: Site, step: Step, chance: random.Random) -> list[tuple[int, float]]:
    """The host that dies, and how many seconds after the first file was written; the first one holds the meeting place."""
    return [(0, chance.uniform(0, 0.3)), (1, chance.uniform(0, 0.3))] if step.name in _BY_HOSTS else []


def run_host_kill(site: Site, step: Step, case: tuple[int, float]) -> Result:
    """Kill one of two hosts; the other must end by itself and say so. Then give the command again to both."""
    host, delay = case
    name = f"{step.name} by two hosts"

    def run(killed: int | None = None) -> list[Run]:
        before = set(site.place.rglob("*"))
        port = free_port()
        agents = [_start_agent(site, step, each, port) for each in range(2)]
        if killed is not None:
            deadline = time.monotonic() + _PATIENCE
            while before.issuperset(site.place.rglob("*")) and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(delay)
            _kill_all(agents[killed])
        return [_finish_agent(step, agent) for agent in agents]

    if name not in site.expected:
        _expect(site, step, name, run)
    found = run(host)
    left = found[1 - host]  # beside its own words there are torchrun's
    problems = [] if left.returncode in (0, 1) and "bug in clipcid" not in left.stderr else [repr(left)]
    return _judge(site, step, name, found, host, problems, run)


def list_worker_kills(site: Site, step: Step, chance: random.Random) -> list[float]:
    """How long after its start a decoding process dies, in seconds."""
    return [chance.uniform(0, 0.3) for _ in range(4)] if step.name in _DECODING else []


def run_worker_kill(site: Site, step: Step, delay: float) -> Result:
    """Kill a process that decodes images, then give the command again."""
    started = site.start(step, CLIPCID_WORKERS="2")
    deadline = time.monotonic() + site.patience(step)
    workers: list[int] = []
    while not workers and started.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
        # Those that the server of workers, a child of the run, has forked.
        workers = [worker for server in _children_of(started.pids[0]) for worker in _children_of(server)]
    time.sleep(delay)
    reached = False
    for worker in workers[:1]:
        with contextlib.suppress(ProcessLookupError):  # it ended by itself
            os.kill(worker, signal.SIGKILL)
            reached = True
    found = site.finish(step, started, 30)
    problems = found.problems()
    if found.returncode and "A decoding process ended" not in found.stderr:
        problems.append("it does not say that a process has ended")
    problems += site.find_half(step)
    problems = ([*problems, repr(found)] if problems else []) + site.check_again(step)
    return Result(found.returncode, problems, reached)


def _expect(site: Site, step: Step, name: str, run: Callable[[], list[Run]]) -> None:
    """Remember what an undisturbed run of two leaves."""
    whole = run()
    assert [found.returncode for found in whole] == [0, 0], whole
    site.expected[name] = read_tree(site.place)
    site.reset(step)


def _judge(
    site: Site,
    step: Step,
    name: str,
    found: list[Run],
    killed: int,
    problems: list[str],
    run: Callable[[], list[Run]],
) -> Result:
    """Judge two of which one was killed, add what is wrong with the one that is left, and give the command to both again."""
    left = found[1 - killed]
    reached = found[killed].returncode == -signal.SIGKILL
    if not reached:
        problems = []
    elif left.returncode and "Another process of the run has ended" not in left.stderr:
        problems = [*problems, "it does not say that a process has ended"]
    problems += site.find_half(step, name) if reached else []
    problems += [f"given again: exit {outcome.returncode}{outcome!r}" for outcome in run() if outcome.returncode != 0]
    problems += site.compare(step, name)
    return Result(left.returncode, [*problems, repr(found)] if problems else [], reached)


def _log_of(site: Site, rank: int) -> Path:
    return site.log.with_name(f"operations-{rank}")


def _start_agent(site: Site, step: Step, host: int, port: str) -> subprocess.Popen[str]:
    places = ("--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(host))
    meeting = ("--master-addr", "127.0.0.1", "--master-port", port)
    command = [sys.executable, "-m", "torch.distributed.run", *places, *meeting, "-m", "clipcid_cli", *step.command]
    return subprocess.Popen(
        command,
        cwd=site.place,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _finish_agent(step: Step, agent: subprocess.Popen[str]) -> Run:
    try:
        out, err = agent.communicate(timeout=_PATIENCE)
    except subprocess.TimeoutExpired:
        _kill_all(agent)
        return Run(step.command, Path(), None, *agent.communicate())
    return Run(step.command, Path(), agent.returncode, out, err)


def _kill_all(agent: subprocess.Popen[str]) -> None:
    """Kill an agent and the processes that it has started, which would outlive it."""
    for process in (agent.pid, *_children_of(agent.pid)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def _children_of(process: int) -> list[int]:
    """Return the processes that a process has started and that go on."""
    try:
        return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except FileNotFoundError:
        return []
