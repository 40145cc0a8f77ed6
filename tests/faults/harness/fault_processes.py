"""Processes of one run that die: a rank of several, or a process that decodes images."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import time
from pathlib import Path

from fault_child import Operations, Running, kill, read_operations
from fault_place import Result, Site, Step, read_tree
from one_process import Outcome

_DECODING = ("embed", "distill", "eval-zeroshot", "eval-linear")
_BY_RANKS = ("embed", "balance", "balance, partitioned", "balance, new shards", "cluster", "distill")


def list_rank_kills(site: Site, step: Step, chance: random.Random) -> list[tuple[int, float]]:
    """The rank that dies, and after which part of its file operations; rank 0 writes most files."""
    if step.name not in _BY_RANKS:
        return []
    return [(rank, chance.random()) for rank in (0, 0, 1, 0, 0, 1, 0, 0, 1)]


def run_rank_kill(site: Site, step: Step, case: tuple[int, float]) -> Result:
    """Kill one of two ranks; the other must end by itself and say so. Then give the command again to both."""
    rank, part = case
    if (name := f"{step.name} by two") not in site.expected:
        whole = _run_ranks(site, step)
        assert [found.code for found in whole] == [0, 0], whole
        site.expected[name] = read_tree(site.place)
        for number in range(2):
            site.operations[f"{name}, rank {number}"] = read_operations(_log_of(site, number))
        site.reset(step)
    operations = site.operations[f"{name}, rank {rank}"]
    if not operations:
        return Result(None, [], False)
    found = _run_ranks(site, step, rank, int(part * len(operations)))
    survivor, problems = found[1 - rank], []
    if reached := found[rank].code == -9:
        problems += survivor.problems()
        if survivor.code and "Another process of the run has ended" not in survivor.err:
            problems.append("it does not say that a process has ended")
        problems += site.find_half(step, name)
    again = _run_ranks(site, step)
    problems += [f"given again: exit {outcome.code}{outcome!r}" for outcome in again if outcome.code != 0]
    problems += site.compare(step, name)
    return Result(survivor.code, [*problems, repr(found)] if problems else [], reached)


def _log_of(site: Site, rank: int) -> Path:
    return site.log.with_name(f"operations-{rank}")


def _run_ranks(site: Site, step: Step, killed: int | None = None, number: int = 0) -> list[Outcome]:
    """Run a step by two ranks, one of them killed at a file operation."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_WORLD_SIZE": "2"}
    ranks: list[Running] = []
    for rank in range(2):
        operations = Operations(_log_of(site, rank), number, act=kill if rank == killed else None)
        ranks.append(site.start(step, operations.install, **world, RANK=str(rank), LOCAL_RANK=str(rank)))
    return [running.finish(site.patience(step) + 30) for running in ranks]


def list_worker_kills(site: Site, step: Step, chance: random.Random) -> list[float]:
    """How long after its start a decoding process dies, in seconds."""
    return [chance.uniform(0, 0.3) for _ in range(4)] if step.name in _DECODING else []


def run_worker_kill(site: Site, step: Step, delay: float) -> Result:
    """Kill a process that decodes images, then give the command again."""
    running = site.start(step, CLIPCID_WORKERS="2")
    deadline = time.monotonic() + site.patience(step)
    while not (workers := _grandchildren(running.process)) and not running.has_ended() and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(delay)
    reached = False
    for worker in workers[:1]:
        with contextlib.suppress(ProcessLookupError):  # it ended by itself
            os.kill(worker, signal.SIGKILL)
            reached = True
    found = running.finish(site.patience(step) + 30)
    problems = found.problems()
    if found.code and "A process that decodes images ended" not in found.err:
        problems.append("it does not say that a process has ended")
    problems += site.find_half(step)
    problems = ([*problems, repr(found)] if problems else []) + site.check_again(step)
    return Result(found.code, problems, reached)


def _grandchildren(process: int) -> list[int]:
    """Return the processes that a child's server of workers has forked."""
    return [worker for server in children_of(process) for worker in children_of(server)]


def children_of(process: int) -> list[int]:
    """Return the processes that a process has started and that go on."""
    try:
        return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except FileNotFoundError:
        return []
