"""Batches prepared by worker processes, in order.

Workers have no state: a batch is a list of small descriptions, and the tensors that `prepare` makes of it depend on the
batch alone. So the result is the same for any number of workers.

Workers are forked from a server process that has already imported PyTorch and the decoders: a worker starts in milliseconds,
without what the main process has loaded since (a model, CUDA, threads that hold locks). PyTorch's DataLoader does not fit:
it notices the death of such a worker only after its timeout for stalls, and its workers outlive a main process that was
killed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import queue
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.queues import Queue
from typing import Any, Generic, TypeVar

import torch

from clipcid_cli.errors import ClipcidError

Batch = TypeVar("Batch")
Prepared = TypeVar("Prepared")

STALL_SECONDS = 600.0
"""Time to prepare a batch after which loading counts as stalled."""

# What workers need, imported once by the server that they are forked from. Nothing here may import faiss.
_WORKER_IMPORTS = [
    "clipcid_cli.runtime.models.lean_open_clip",
    "clipcid_cli.runtime.models.clip_model",
    "clipcid_cli.runtime.models.decode",
    "clipcid_cli.runtime.loading",
    "clipcid_cli.formats.data.samples",
    "clipcid_cli.formats.data.index",
]


def default_workers(device: torch.device) -> int:
    """Return the default number of workers: one per core beyond the first, on a CPU at most 8.

    Cores are those this process may use, divided among the processes of this host. A GPU takes thousands of images a
    second, of which a core decodes some hundreds; a CPU computes with the cores that do not decode.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    free = cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1
    return max(1, free if device.type == "cuda" else min(8, free))


def start_worker_server() -> None:
    """Start the server that workers are forked from, so that its imports run in parallel with the caller's.

    Calling it again has no effect.
    """
    _context().set_forkserver_preload(_WORKER_IMPORTS)
    multiprocessing.resource_tracker.ensure_running()  # which would let SIGINT through again
    # The server inherits what is blocked: Ctrl-C, which reaches it as well, would end its imports with a traceback.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def load_batches(
    batches: Iterable[Batch],
    prepare: Callable[[Batch], Prepared],
    workers: int,
    *,
    ahead: int = 2,
    stall_seconds: float = STALL_SECONDS,
) -> Generator[Prepared]:
    """Prepare batches, in order.

    Args:
        batches: What to prepare; consumed as workers become free, so it may be a generator over any number of shards.
            Each item is sent to a worker and must be picklable and small (offsets in files, not their content).
        prepare: Picklable function of one batch. A ClipcidError it raises is raised here.
        workers: Number of worker processes; 0 prepares in this process.
        ahead: Batches queued for each worker, so that it never waits for this process.
        stall_seconds: Time to wait for a batch before loading counts as stalled.

    Yields:
        The result of `prepare` for each batch, in the order of `batches`. Tensors are passed through shared memory.
    """
    if workers == 0:
        for batch in batches:
            yield prepare(batch)
        return
    start_worker_server()
    crew = [_Worker(_context(), prepare) for _ in range(workers)]
    try:
        waiting: deque[_Worker] = deque()
        for number, batch in enumerate(batches):
            worker = crew[number % workers]
            worker.give(batch)
            waiting.append(worker)
            if len(waiting) > ahead * workers:
                yield waiting.popleft().take(stall_seconds)
        while waiting:
            yield waiting.popleft().take(stall_seconds)
    finally:
        for worker in crew:
            worker.end()


def read_ahead(items: Iterable[Batch], count: int) -> Iterator[Batch]:
    """Take items in a thread of its own, so that waiting for a network overlaps with what the caller does.

    Args:
        count: Items that may wait to be taken.

    Yields:
        The items, in order.
    """
    ready: queue.Queue[tuple[Any, bool]] = queue.Queue(count)
    stopped = threading.Event()

    def give(entry: tuple[Any, bool]) -> bool:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(entry, timeout=0.1)
                return True
        return False

    def take() -> None:
        failure = None
        try:
            for item in items:
                if not give((item, False)):
                    return
        except BaseException as error:
            failure = error
        give((failure, True))

    threading.Thread(target=take, daemon=True).start()
    try:
        while True:
            item, ended = ready.get()
            if not ended:
                yield item
            elif item is None:
                return
            else:
                raise item
    finally:
        stopped.set()


@dataclasses.dataclass
class _Outcome(Generic[Prepared]):
    """The result of one batch, or its error."""

    value: Prepared | None
    error: ClipcidError | None = None
    trace: str | None = None


class _Worker:
    """A process that prepares batches, one after the other."""

    def __init__(self, context: ForkServerContext, prepare: Callable[[Any], Any]) -> None:
        # Putting into a queue never blocks; writing to a pipe could while the worker is busy.
        self._batches: Queue[Any] = context.Queue()
        self._results, sender = context.Pipe(duplex=False)
        self._process: ForkServerProcess = context.Process(
            target=_work, args=(prepare, self._batches, sender), daemon=True
        )
        try:
            self._process.start()
        except (EOFError, OSError) as error:  # it, or the server it is forked from, ended before it was told its work
            raise _ended(None) from error
        sender.close()

    def give(self, batch: Any) -> None:
        """Queue a batch."""
        self._batches.put(batch)

    def take(self, stall_seconds: float) -> Any:
        """Wait for the result of the oldest batch."""
        ready = multiprocessing.connection.wait([self._results, self._process.sentinel], timeout=stall_seconds)
        if not ready:
            raise ClipcidError(
                f"A process that decodes images returned no batch for {stall_seconds:.0f} seconds: reading has stalled.",
                "Check the disk or network that holds the data; --workers 0 reads in the main process.",
            )
        try:
            outcome: _Outcome[Any] = self._results.recv()
        except (EOFError, OSError) as error:
            self._process.join(5)
            raise _ended(self._process.exitcode) from error
        if outcome.error is not None:
            raise outcome.error
        if outcome.trace is not None:
            raise RuntimeError(f"in a process that decodes images:\n{outcome.trace}")
        return outcome.value

    def end(self) -> None:
        """End the process, whatever it is doing: it has no state to lose."""
        self._process.terminate()
        self._process.join()
        self._results.close()
        self._batches.cancel_join_thread()
        self._batches.close()


def _ended(code: int | None) -> ClipcidError:
    return ClipcidError(
        f"A process that decodes images ended ({_describe_exit(code)}).",
        "If memory or the space in /dev/shm ran out, use fewer --workers or a smaller --batch-size.",
    )


def _work(prepare: Callable[[Any], Any], batches: Queue[Any], results: Connection) -> None:
    """Prepare batches until ended; runs in the worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process handles Ctrl-C, and ends this one
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    while True:
        batch = batches.get()
        outcome: _Outcome[Any]
        try:
            outcome = _Outcome(prepare(batch))
        except ClipcidError as error:
            outcome = _Outcome(None, error=error)
        except Exception:
            outcome = _Outcome(None, trace=traceback.format_exc())
        results.send(outcome)


def _end_with_parent() -> None:
    """End this process when the main one has ended, even by kill -9, which sends no signal here."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has a parent"
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _describe_exit(code: int | None) -> str:
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-code).name}"
    return "at its start" if code is None else f"exit code {code}"


def _context() -> ForkServerContext:
    return multiprocessing.get_context("forkserver")
