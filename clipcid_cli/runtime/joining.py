"""How the processes of a run find each other, and how each learns of the error of another."""

from __future__ import annotations

import atexit
import dataclasses
import datetime
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.rendezvous import rendezvous

from clipcid_cli.errors import ClipcidError, in_one_line
from clipcid_cli.runtime.distributed import DistContext
from clipcid_cli.runtime.heartbeat import NOTHING_DONE, Heartbeat, name_processes, place_of

SILENCE = datetime.timedelta(minutes=30)
"""How long a process that others wait for may show no sign of work, or one exchange take that all take part in."""

RENDEZVOUS_TIMEOUT = datetime.timedelta(minutes=10)
"""How long a process waits for the others to start: importing PyTorch on many hosts from one disk takes minutes."""

# Seconds in which all that have waited in vain come together; one that does not is the one that hangs.
_LAST_MEETING = 10.0

# In errors of a collective that another process no longer takes part in; those of gloo have no class of their own.
_LOST = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")


@contextmanager
def join_run(context: DistContext) -> Iterator[DistContext]:
    """Join the processes of a run, as torchrun's environment describes them, until the block ends.

    Args:
        context: This process among them, not joined yet.
    """
    rank, size = context.rank, context.size
    on_gpu = context.device.type == "cuda"
    store = rendezvous_all(rank, size)
    heartbeat = Heartbeat(store, rank, size, SILENCE)
    try:
        with _name_failures(store, rank, heartbeat):
            dist.init_process_group(
                # Objects, and numbers that only the host needs, never travel through a GPU.
                "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
                store=store,
                rank=rank,
                world_size=size,
                timeout=RENDEZVOUS_TIMEOUT,  # one may have ended since it arrived
                device_id=context.device if on_gpu else None,
            )
            _set_pg_timeout(SILENCE)
            yield dataclasses.replace(context, heartbeat=heartbeat)
    except BaseException:
        if heartbeat.has_given_up:
            atexit.register(_leave)
        elif not on_gpu and dist.is_initialized():
            # NCCL would first wait for what the other processes will never send; ending the process ends its part, too.
            dist.destroy_process_group()
        raise
    finally:
        heartbeat.close()
    dist.destroy_process_group()


def _leave() -> None:
    """End this process without what gloo does at its end: it would wait for a meeting to which one process never comes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def rendezvous_all(rank: int, size: int, limit: datetime.timedelta = RENDEZVOUS_TIMEOUT) -> Any:
    """Wait until all processes of the run have started, and return the store through which they find each other."""
    try:
        store, _, _ = next(iter(rendezvous("env://", rank, size, timeout=limit)))
        store.set(place_of(rank), NOTHING_DONE)
        store.wait([place_of(other) for other in range(size)], limit)
    except ValueError as error:
        raise ClipcidError(
            f"WORLD_SIZE is {size}, but the environment does not say where the processes connect: {error}.",
            "Start the run with torchrun, or unset WORLD_SIZE.",
        ) from error
    except dist.DistStoreError as error:  # what PyTorch raises when a limit has passed
        raise ClipcidError(
            f"Process {rank} waited {limit.total_seconds() / 60:g} minutes for the other {size - 1} of the run, but not all "
            "of them connected.",
            "Look for the error of the one that ended first; check that all hosts are started with the same "
            "--rdzv-endpoint and can reach it.",
        ) from error
    except (RuntimeError, OSError) as error:
        raise ClipcidError(
            f"Process {rank} could not connect to the other {size - 1} of the run: {in_one_line(error, 200)}.",
            "Check MASTER_ADDR and MASTER_PORT (torchrun: --rdzv-endpoint): the host must be reachable, the port free.",
        ) from error
    return store


@contextmanager
def _name_failures(store: Any, rank: int, heartbeat: Heartbeat) -> Iterator[None]:
    """Tell the other processes of an error that only this one has; where it is the loss of another, say whose and why."""
    key = "clipcid/failed"
    try:
        yield
    except Exception as error:
        text = in_one_line(error).rstrip(".: ")
        lost = isinstance(error, dist.DistError) or (
            isinstance(error, RuntimeError) and any(words in text for words in _LOST)
        )
        if not lost:
            named = error.message if isinstance(error, ClipcidError) else f"{type(error).__name__}: {text}"
            with suppress(RuntimeError, OSError):  # the store ends with the process that has it
                store.set(key, json.dumps([rank, named.rstrip(".: ")]))
            raise
        message = f"Another process of the run has ended, or cannot be reached: {text}."
        fix = "Its own error says why; without one it hangs or was killed, perhaps for memory."
        with suppress(RuntimeError, OSError, ValueError):
            # Where one has waited in vain, all others but the one that hangs lose it, and come.
            timed_out = "imed out" in text
            absent = heartbeat.absent(_LAST_MEETING if timed_out else 0.0)
            if absent and timed_out:
                message = f"{name_processes(absent)} of the run did not answer: {text}."
            if store.check([key]):
                other, named = json.loads(store.get(key))
                message = f"Process {other} of the run failed: {named}."
                fix = "Its own error says how to fix it."
        raise ClipcidError(message, f"{fix} Then run the same command again: it continues where it stopped.") from error
