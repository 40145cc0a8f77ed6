"""A failure of one process ends the others, which say whose it was and what it was: two real gloo processes."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import socket
import time
from typing import Any

import torch
import torch.distributed as dist
from conftest import process_context

from clipcid_cli.errors import ClipcidError
from clipcid_cli.runtime import distributed
from clipcid_cli.runtime.distributed import open_dist_context


def process(rank: int, port: int, hangs: bool, results: multiprocessing.Queue) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    distributed._ROLL_CALL = 2.0
    try:
        with open_dist_context("cpu") as context:
            context.barrier()
            if rank == 1 and hangs:
                time.sleep(60)
            if rank == 1:
                raise OSError(5, "Input/output error", "/data/00007.tar")
            with context.limited_waits(datetime.timedelta(seconds=3)):
                dist.all_reduce(torch.ones(4))  # as gradients are summed
    except Exception as error:
        results.put((rank, type(error), error.message if isinstance(error, ClipcidError) else str(error)))


def start(hangs: bool) -> tuple[list[Any], multiprocessing.Queue]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = process_context()
    results = context.Queue()
    workers = [context.Process(target=process, args=(rank, port, hangs, results)) for rank in range(2)]
    for worker in workers:
        worker.start()
    return workers, results


def test_a_process_that_hangs_is_named_by_those_that_wait() -> None:
    workers, results = start(hangs=True)
    rank, kind, message = results.get(timeout=120)
    for worker in workers:
        worker.kill()
    assert (rank, kind) == (0, ClipcidError)
    assert message.startswith("Another process of the run has ended, or cannot be reached: ")
    assert message.endswith(" No answer from process 1: it hangs or was killed.")


def test_the_others_name_the_process_that_failed_and_its_error() -> None:
    workers, results = start(hangs=False)
    answers = [results.get(timeout=120)]
    first = time.monotonic()
    answers.append(results.get(timeout=120))
    assert time.monotonic() - first < 30
    for worker in workers:
        worker.join(timeout=60)
        assert worker.exitcode == 0
    found = {rank: (kind, message) for rank, kind, message in answers}
    assert found[1] == (OSError, "[Errno 5] Input/output error: '/data/00007.tar'")
    assert found[0] == (
        ClipcidError,
        "Process 1 of the run failed: OSError: [Errno 5] Input/output error: '/data/00007.tar'.",
    )
