"""The processes of one run, one or as many as torchrun started, and device, cores and memory of each.

``torch.distributed`` is the one engine: NCCL for tensors on GPUs, gloo for tensors on CPUs and for objects.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

from clipcid_cli.errors import ClipcidError
from clipcid_cli.runtime.host import count_cores, count_processes

if TYPE_CHECKING:
    from clipcid_cli.runtime.heartbeat import Heartbeat

P = ParamSpec("P")
T = TypeVar("T")

# One that works is waited for as long as it does: it may read slower shards, or write what only the first one writes.
_LONGEST_WAIT = datetime.timedelta(days=7)

TRAINING_TIMEOUT = datetime.timedelta(minutes=20)
"""How long processes wait for one another in training, where all of them do the same: a hung one idles every GPU."""


@dataclasses.dataclass(frozen=True)
class DistContext:
    """This process among those of the run."""

    rank: int
    size: int
    local_rank: int  # among those of its host
    device: torch.device
    # How it knows that others work which it waits for; None where it is alone, or the caller has started the processes.
    heartbeat: Heartbeat | None = dataclasses.field(default=None, repr=False, compare=False)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes shared files and reports to the user."""
        return self.rank == 0

    @property
    def spans_hosts(self) -> bool:
        """Whether the run has processes on several hosts, or may have them: nobody says how many are on this one."""
        return self.size > count_processes()

    def rank_range(self, count: int) -> tuple[int, int]:
        """Return this process's even share of 0 … number − 1: the first, and the one after the last."""
        return count * self.rank // self.size, count * (self.rank + 1) // self.size

    def block_range(self, count: int, size: int) -> tuple[int, int]:
        """Return a share as `rank_range` does, in whole blocks of `size`: these are the same for any number of processes."""
        first, last = self.rank_range(-(-count // size))
        return min(first * size, count), min(last * size, count)

    def barrier(self) -> None:
        if self.size > 1:
            self._meet()
            dist.barrier()

    def broadcast(self, value: T) -> T:
        """Return the first process's value on every process; it is pickled, between our own processes only."""
        if self.size == 1:
            return value
        self._meet()
        box: list[Any] = [value]
        dist.broadcast_object_list(box)
        return box[0]  # type: ignore[no-any-return]  # the box is a list of anything by torch's signature

    def gather(self, value: T) -> list[T]:
        """Return every process's value, in order of rank, on every process."""
        if self.size == 1:
            return [value]
        self._meet()
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum the tensor over all processes, in place."""
        if self.size > 1:
            self._meet()
            dist.all_reduce(tensor)
        return tensor

    def _meet(self) -> None:
        """Wait for the other processes, as long as they work, before something is exchanged with them."""
        if self.heartbeat is not None and not self.heartbeat.rests:
            options = dist.BarrierOptions()
            options.timeout = _LONGEST_WAIT
            self.heartbeat.wait(_gloo().barrier(options))

    @contextmanager
    def limited_waits(self, limit: datetime.timedelta = TRAINING_TIMEOUT) -> Iterator[None]:
        """Let the run fail in the block once a process waits so long for another, at work or not; the error names it."""
        if self.size == 1:
            yield
            return
        hosts = _gloo()
        before = hosts.options._timeout
        # First on the hosts: after a timeout of its GPU a process is ended by PyTorch, without a word from us.
        _set_pg_timeout(1.5 * limit)
        hosts._set_default_timeout(limit)
        try:
            with nullcontext() if self.heartbeat is None else self.heartbeat.resting():
                yield
        finally:
            _set_pg_timeout(before)

    def on_rank0(self, action: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `action` on the first process only and return its result, or raise its error, on all."""
        if self.size == 1:
            return action(*args, **kwargs)
        outcome: Any = None
        if self.is_main:
            try:
                outcome = (action(*args, **kwargs), None)
            except ClipcidError as error:
                outcome = (None, error)
        result, failure = self.broadcast(outcome)
        if failure is not None:
            failure.already_reported = not self.is_main
            raise failure
        return result  # type: ignore[no-any-return]  # of the action

    def on_all(self, action: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `action` on every process and return its result on each, unless it failed on any."""
        with self.agreeing():
            return action(*args, **kwargs)

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """Raise an error of the block on every process, whichever of them has it."""
        failure = None
        try:
            yield
        except ClipcidError as error:
            failure = error
        self.agree(failure)

    def agree(self, error: ClipcidError | None) -> None:
        """Raise on every process when any of them has an error, so that none waits for one that has ended."""
        for rank, failure in enumerate(self.gather(error)):
            if failure is not None:
                failure.already_reported = rank != self.rank
                raise failure


@contextmanager
def open_dist_context(device: str = "auto") -> Iterator[DistContext]:
    """Join the run's processes (as torchrun's environment describes them) and choose this one's device.

    Where the caller has already initialised ``torch.distributed``, its group is used and left open; its backend must fit the
    device (``gloo`` for ``cpu``, ``cpu:gloo,cuda:nccl`` for ``cuda``). Of several GPUs LOCAL_RANK says which.
    """
    joined = dist.is_available() and dist.is_initialized()
    rank = dist.get_rank() if joined else int(os.environ.get("RANK", "0"))
    size = dist.get_world_size() if joined else int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    chosen = _choose_device(device, local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if size == 1:
        yield DistContext(0, 1, local_rank, chosen)
        return
    # torchrun sets OMP_NUM_THREADS=1 for several processes when it is unset, which leaves most cores of a CPU run idle;
    # that value is indistinguishable from a user's own 1. For one process it sets nothing: what is set is the user's.
    if os.environ.get("LOCAL_WORLD_SIZE", "1") != "1" and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        torch.set_num_threads(max(1, count_cores()))
    context = DistContext(rank, size, local_rank, chosen)
    if joined:
        yield context
        return
    from clipcid_cli.runtime.joining import join_run  # and with it what a single process does without

    with join_run(context) as joined_context:
        yield joined_context


def _gloo() -> Any:
    """Return the part of the processes' group that works between hosts."""
    return dist.distributed_c10d._get_default_group()._get_backend(torch.device("cpu"))


def _choose_device(device: str, local_rank: int) -> torch.device:
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if count == 0:
        raise ClipcidError("--device cuda: PyTorch finds no GPU.", "Use --device cpu or auto.")
    if local_rank >= count:
        raise ClipcidError(
            f"Process {local_rank} of this host has no GPU of its own: it has {count}.",
            f"Start at most {count} processes per host (torchrun --nproc-per-node {count}).",
        )
    return torch.device("cuda", local_rank)


def memory_in_use(device: torch.device) -> int:
    """Return the bytes in use: of a GPU, what PyTorch has reserved there; else the resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        # Without /proc (macOS) the peak is the best there is; it is in bytes there, in KiB elsewhere.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak
    return pages * resource.getpagesize()


def device_memory(device: torch.device) -> int | None:
    """Return the bytes of memory that a GPU has; None of a CPU."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def available_memory(device: torch.device) -> int:
    """Return the bytes of a GPU's memory that this process could still take: what is free, and what it has freed itself."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def memory_for_rows(device: torch.device, on_cpu: int = 2**31) -> int:
    """Return how many bytes of rows a process may keep on its device: on a GPU 60 % of what is free."""
    if device.type != "cuda":
        return on_cpu
    free, _ = torch.cuda.mem_get_info(device)
    return int(0.6 * free)
