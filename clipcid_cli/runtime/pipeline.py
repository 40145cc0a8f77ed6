"""A function applied to a stream of items while the caller works on earlier results: by processes, threads, one step ahead.

Results come in the order of the items. Functions have no state, so results are the same for any number of workers. An
error, of the function or of the stream itself, is raised in the place of its item, after the results of those before.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import shutil
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from clipcid_cli.at_work import note_work
from clipcid_cli.errors import ClipcidError
from clipcid_cli.runtime.distributed import memory_in_use
from clipcid_cli.runtime.host import count_cores, count_processes, memory_limit

Item = TypeVar("Item")
Result = TypeVar("Result")

_CONTEXT = multiprocessing.get_context("forkserver")

# What workers need, imported once by the server that they are forked from. Nothing here may import faiss.
_WORKER_IMPORTS = [
    "clipcid_cli.runtime.worker_server",
    "clipcid_cli.runtime.models.guarded_open_clip",
    "clipcid_cli.runtime.models.renderer",
    "clipcid_cli.runtime.models.views",
    "clipcid_cli.runtime.models.decode",
    "clipcid_cli.runtime.pipeline",
    "clipcid_cli.formats.data.samples",
    "clipcid_cli.formats.data.distant",
    "clipcid_cli.formats.data.tar_shards",
    "clipcid_cli.formats.data.index",
]

_SAFE_PATH, _OWN = "PYTHONSAFEPATH", "clipcid"  # Python's variable, and its value where it is set here

# Items that wait for each worker or thread, so that it never waits for this process.
_AHEAD = 2
STALL_SECONDS = 600.0
"""Time to wait for a result, or for any sign of activity, before a worker counts as stalled."""
_LOOKS = 20  # for activity, in that time
# The end of a worker that was killed is seen a moment after its pipe breaks.
_REAP_SECONDS = 2.0

# Private memory of a worker beside the item it makes: 22 MB measured, and a large image.
_WORKER_BYTES = 64 * 2**20

# More threads would wait for Python's lock; on more cores each batch is computed by several.
_MAX_THREADS = 16

# Multiplications in one matrix product below which a second thread gains nothing: logistic regression on 900 × 384 features
# and 50 classes (1.7e7) took 0.83 s with one thread and 0.89 s with two, and many times that with two when another program
# held a core, since every small product waits for the slower thread.
_SMALL_PRODUCT = 5e7


def default_workers(device: torch.device) -> int:
    """Return the default number of worker processes: one per core beyond the first, at most 8 where the CPU computes too."""
    free = count_cores() - 1
    return max(1, free if device.type == "cuda" else min(8, free))


def threads_for_batches(device: torch.device) -> int:
    """Return how many batches to compute at once: one a core on a CPU, one on a GPU, which does not share its time.

    On a CPU, two threads that each take a batch of their own are faster than one batch computed by two threads, which
    wait for each other in every layer: a ViT of 4 layers, 128 wide, took 0.63 ms an image against 0.9 to 1.2, ViT-B-32
    32 ms against 38 (2 cores with AMX), and the embeddings were the same bit for bit.
    """
    return min(torch.get_num_threads(), _MAX_THREADS) if device.type == "cpu" else 1


class HostMemory(NamedTuple):
    """Bytes that the processes of a run take of this host, at most: all of it, and what of it is in /dev/shm."""

    total: int
    shared: int


def host_memory_of(
    item_bytes: int,
    batch_bytes: int,
    workers: int,
    num_parts: int = 1,
    *,
    num_items: int | None = None,
    training: int = 0,
    checkpoint: int = 0,
) -> HostMemory:
    """Estimate what a run takes of this host, with as many other processes like this one.

    Args:
        item_bytes: What a worker makes of one item, which waits in /dev/shm.
        batch_bytes: What is held of a batch in this process.
        workers: Of each process.
        num_parts: Items of which a batch is made; those of the next one are copied meanwhile.
        num_items: Items of this process in the whole run, at most; None where that is not known.
        training: What each process will take besides.
        checkpoint: What one process of the host takes while a checkpoint is written.
    """
    processes = count_processes()
    waiting = _AHEAD * workers + num_parts
    if num_items is not None:
        waiting = min(waiting, num_items)
    shared = processes * item_bytes * waiting if workers else 0
    batches = 2 if num_parts == 1 else 3
    own = memory_in_use(torch.device("cpu")) + batches * batch_bytes + workers * (_WORKER_BYTES + item_bytes) + training
    return HostMemory(processes * own + shared + checkpoint, shared)


def validate_host_memory(needed: HostMemory, workers: int, *, trains: bool = False) -> HostMemory:
    """Return what a run with so many workers a process takes of this host; an error where it has less."""
    processes = count_processes()
    what = "workers of this host and their batches"
    smaller = "Use fewer --workers or a smaller --batch-size"
    if trains:
        what = "workers of this host, their batches, the training and the copy that a checkpoint is written from"
        smaller = "Use fewer --workers, a smaller --batch-size or a larger --accum-freq"
    limits = [(needed.total, memory_limit(), "memory", smaller)]
    with suppress(OSError):  # only Linux has it
        free = shutil.disk_usage("/dev/shm").free
        limits.append((needed.shared, free, "free space in /dev/shm", f"{smaller}; in a container, more --shm-size"))
    for takes, there, kind, fix in limits:
        if takes > there:
            raise ClipcidError(
                f"The {processes} x {workers} {what} take up to {takes / 1e9:,.1f} GB, and it has {there / 1e9:,.1f} GB of "
                f"{kind}.",
                f"{fix}.",
            )
    return needed


@contextmanager
def threads_for(product_size: float) -> Iterator[None]:
    """Run many products of so many multiplications (rows × width × classes) on as many threads as gain something."""
    before = torch.get_num_threads()
    if product_size < _SMALL_PRODUCT:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def start_worker_server() -> None:
    """Start the server that workers are forked from, so that its imports run in parallel with the caller's.

    A worker that it forks starts in milliseconds, without what the main process has loaded since: a model, CUDA, locks.
    """
    _CONTEXT.set_forkserver_preload(_WORKER_IMPORTS)
    with _ignoring_current_folder():
        _start_server()


@contextmanager
def _ignoring_current_folder() -> Iterator[None]:
    """Let Python programs that start inside the block import nothing from the current folder: it may hold data."""
    if _SAFE_PATH in os.environ:
        yield
        return
    os.environ[_SAFE_PATH] = _OWN
    try:
        yield
    finally:
        del os.environ[_SAFE_PATH]


def _start_server() -> None:
    # The tracker removes the semaphores of a process that was killed; its warning of them would come after the prompt.
    sys.warnoptions.append("ignore")
    multiprocessing.resource_tracker.ensure_running()  # the server would start it, too, and let SIGINT through again
    sys.warnoptions.pop()
    # The server and its workers inherit what is blocked. Ctrl-C, and torchrun's SIGTERM, reach the whole group of processes;
    # this one may still need them to save itself, and they end with it.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def ordered_map(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int,
    activity: Callable[[], int] | None = None,
) -> Generator[Result]:
    """Apply a picklable function by worker processes, or with none in this one; tensors come back through shared memory.

    Items are taken as workers become free; each is sent to one, so it must be small (offsets in files, not their content).

    Args:
        activity: Returns a number that differs after a worker has received something, however slowly: then it has not
            stalled. Picklable, called in the workers.
    """
    if workers == 0:
        yield from map(function, items)
        return
    start_worker_server()
    signs = _CONTEXT.RawValue("Q")  # of activity; several workers may count at once, as long as it changes
    pool = ProcessPoolExecutor(
        workers, _CONTEXT, initializer=_begin_work, initargs=(function, activity, signs, STALL_SECONDS / _LOOKS)
    )
    crew = pool._processes  # nothing public tells how a worker ended
    assert crew is not None, "a new pool has its processes"

    def submit(item: Item) -> Future[Result]:
        try:
            return pool.submit(_work, item)
        except (EOFError, OSError) as error:
            # The worker, or the server that it is forked from, ended before it was told its work.
            raise BrokenProcessPool from error

    try:
        for future in _in_order(submit, items, _AHEAD * workers):
            _wait(future, signs)
            note_work()
            yield future.result()
    except BrokenProcessPool as error:
        if isinstance(error.__cause__, EOFError | OSError):
            multiprocessing.connection.wait([worker.sentinel for worker in list(crew.values())], _REAP_SECONDS)
        ended = _describe_end(crew.values())
        for worker in list(crew.values()):
            worker.kill()  # the pool waits for all, and SIGTERM does not reach them
        pool.shutdown()
        # A pipe breaks, or has no more to read, where the process at its other end has ended.
        its_end = isinstance(error.__cause__, EOFError | ConnectionError)
        if ended is None and error.__cause__ is not None and not its_end:
            reason = str(error.__cause__).strip("'\n").splitlines()[-1]
            raise ClipcidError(
                f"The output of a decoding process could not be received ({reason}).",
                "If too many files are open, allow more: ulimit -n 4096",
            ) from error
        raise ClipcidError(
            f"A decoding process ended ({ended or 'at its start'}).",
            "If memory or the space in /dev/shm ran out, use fewer --workers or a smaller --batch-size.",
        ) from error
    finally:
        # Whatever they are doing: they have no state to lose.
        pool.shutdown(wait=False)
        for worker in list(crew.values()):
            worker.kill()


def _wait(future: Future[Any], signs: Any) -> None:
    """Wait for a result; an error where there is neither one nor a sign of activity for too long."""
    last = signs.value
    end = time.monotonic() + STALL_SECONDS
    while not concurrent.futures.wait([future], STALL_SECONDS / _LOOKS).done:
        if signs.value != last:
            last = signs.value
            end = time.monotonic() + STALL_SECONDS
            note_work()
        elif time.monotonic() > end:
            raise ClipcidError(
                f"A decoding process returned no batch for {STALL_SECONDS:g} seconds: reading has stalled.",
                "Check the disk or network that holds the data; --workers 0 reads in the main process.",
            )


def thread_map(function: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """Apply a function by threads, which share this process's cores; 1 computes in the caller's, which takes the items.

    Pillow and PyTorch release Python's lock while they work, so threads decode as well, and no process has to start first.
    """
    return map(function, items) if threads == 1 else _map_by_threads(function, items, threads)


def _map_by_threads(function: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    cores = torch.get_num_threads()
    torch.set_num_threads(max(1, cores // threads))
    try:
        yield from _results(ThreadPoolExecutor(threads), function, items, _AHEAD * threads)
    finally:
        torch.set_num_threads(cores)


class Background:
    """A thread that does one thing while the caller goes on; leaving the block waits for it.

    What goes wrong in it is raised by the next call. So at most two things are held: the one in work, and the caller's next.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="background")
        self._pending: Future[None] | None = None

    def __enter__(self) -> Background:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._pool.shutdown()

    def start(self, work: Callable[[], None]) -> float:
        """Start some work once the work before is done; return the seconds that the caller waited for that."""
        waited = self.wait()
        self._pending = self._pool.submit(work)
        return waited

    def wait(self) -> float:
        """Wait until the work is done; return the seconds that the caller waited."""
        began = time.perf_counter()
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()
        return time.perf_counter() - began


def read_ahead(items: Iterable[Item], count: int) -> Generator[Item]:
    """Take up to `count` items ahead in a thread, so that waiting for a network overlaps with what the caller does."""
    stream = iter(items)
    end = object()
    pool = ThreadPoolExecutor(1)

    def take(_: None) -> Future[Any]:
        return pool.submit(next, stream, end)

    try:
        for future in _in_order(take, itertools.repeat(None), count):
            item = future.result()
            if item is end:
                return
            yield item
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # the network may not answer


def prefetch(
    function: Callable[[Item], Result], items: Iterable[Item], device: torch.device, ahead: int = 1
) -> Generator[Result]:
    """Apply a function in a thread, to the next items while the caller works on the current one.

    Its results are data classes of tensors on the device. On a GPU its copies and operators go to a stream of their own, for
    which the caller's current stream waits; the host does not.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    cores = torch.get_num_threads()
    pool.submit(_use_one_core).result()
    torch.set_num_threads(cores)  # which the other thread has changed for those that start later
    if device.type != "cuda":
        yield from _results(pool, function, items, ahead)
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    # What the function reads was written by the current stream, before.
    stream.wait_stream(torch.cuda.current_stream(device))

    def run(item: Item) -> tuple[Result, torch.cuda.Event]:
        with torch.cuda.stream(stream):
            return function(item), stream.record_event()

    for result, done in _results(pool, run, items, ahead):
        current = torch.cuda.current_stream(device)
        current.wait_event(done)
        for tensor in _tensors_of(result):
            if tensor.device == device:
                tensor.record_stream(current)  # or its memory would be given to the next batch while it is in use
        yield result


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to a device; to a GPU from pinned memory, so that neither the host nor another stream waits for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def join_on(device: torch.device, parts: Sequence[Tensor]) -> Tensor:
    """Join tensors along their first axis on a device, as `to_device` copies one."""
    if len(parts) == 1:
        return to_device(parts[0], device)
    first = parts[0]
    joined = torch.empty((sum(map(len, parts)), *first.shape[1:]), dtype=first.dtype, pin_memory=device.type == "cuda")
    torch.cat(list(parts), out=joined)
    return joined.to(device, non_blocking=True)


def _in_order(submit: Callable[[Item], Future[Result]], items: Iterable[Item], ahead: int) -> Generator[Future[Result]]:
    """Submit items, and yield each one's future once `ahead` more are on their way."""
    waiting = deque[Future[Result]]()
    try:
        for item in items:
            waiting.append(submit(item))
            if len(waiting) > ahead:
                yield waiting.popleft()
    except Exception as error:
        failed = Future[Result]()
        failed.set_exception(error)
        waiting.append(failed)
    while waiting:
        yield waiting.popleft()


def _results(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item], ahead: int
) -> Generator[Result]:
    """Yield results of a pool of threads and end it: with the items in work, but not those that wait."""
    try:
        for future in _in_order(lambda item: pool.submit(function, item), items, ahead):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _use_one_core() -> None:
    """Let this thread compute by itself: the caller computes with all cores."""
    torch.get_num_threads()  # its first call in a thread sets the number to the process's
    torch.set_num_threads(1)


def _tensors_of(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a data class, in its fields or in theirs."""
    if isinstance(value, Tensor):
        yield value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _tensors_of(getattr(value, field.name))


_function: Callable[[Any], Any]
"""In a worker: what it was started for."""


def _begin_work(function: Callable[[Any], Any], activity: Callable[[], int] | None, signs: Any, seconds: float) -> None:
    """Prepare this process, a worker, which looks for activity every so many seconds."""
    global _function
    _function = function
    if os.environ.get(_SAFE_PATH) == _OWN:  # not for the commands of ``pipe:``
        del os.environ[_SAFE_PATH]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process handles Ctrl-C
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if activity is not None:
        threading.Thread(target=_count_signs, args=(activity, signs, seconds), daemon=True).start()
    torch.set_num_threads(1)


def _work(item: Any) -> Any:
    return _function(item)


def _count_signs(activity: Callable[[], int], signs: Any, seconds: float) -> None:
    last = activity()
    while True:
        time.sleep(seconds)
        now = activity()
        signs.value += now != last
        last = now


def _end_with_parent() -> None:
    """End this process when the main one has ended, even by kill -9, which sends no signal here."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has a parent"
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _describe_end(workers: Iterable[BaseProcess]) -> str | None:
    """Say how the first of the workers ended, if one has."""
    code = next((worker.exitcode for worker in list(workers) if worker.exitcode is not None), None)
    if code is not None and code < 0:
        with suppress(ValueError):
            return f"killed by {signal.Signals(-code).name}"
    return None if code is None else f"exit code {code}"
