"""A failure of one process ends the others, which say whose it was and what it was: two real gloo processes."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time

import torch
import torch.distributed as dist
from conftest import process_context

from clipcid_cli.errors import ClipcidError
from clipcid_cli.runtime.distributed import open_dist_context


def process(rank: int, port: int, results: multiprocessing.Queue) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        with open_dist_context("cpu") as context:
            context.barrier()
            if rank == 1:
                raise OSError(5, "Input/output error", "/data/00007.tar")
            dist.all_reduce(torch.ones(4))  # as gradients are summed
    except Exception as error:
        results.put((rank, type(error), error.message if isinstance(error, ClipcidError) else str(error)))


def test_the_others_name_the_process_that_failed_and_its_error() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = process_context()
    results = context.Queue()
    workers = [context.Process(target=process, args=(rank, port, results)) for rank in range(2)]
    for worker in workers:
        worker.start()
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
