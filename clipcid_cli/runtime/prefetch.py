"""What the next step needs, prepared while the current one runs: by a thread, on a GPU in a stream of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

Batch = TypeVar("Batch")
Prepared = TypeVar("Prepared")


def prefetch(
    batches: Iterable[Batch], prepare: Callable[[Batch], Prepared], device: torch.device
) -> Generator[Prepared]:
    """Prepare each batch in a thread while the caller works on the one before.

    Args:
        batches: Taken by the caller's thread, one ahead of what it works on.
        prepare: Called in the thread, for one batch after another. On a GPU its copies and operators go to a stream of
            their own, which the caller's current stream waits for; the host does not.
        device: Where `prepare` puts its tensors.

    Yields:
        What `prepare` returned for each batch, in order. An error of `batches` or of `prepare` is raised in the place of
        its batch, after the results of those before.
    """
    waiting = iter(batches)
    stream = _PrefetchStream(device) if device.type == "cuda" else None
    pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    try:
        threads = torch.get_num_threads()
        pool.submit(_use_one_core).result()
        torch.set_num_threads(threads)  # which the other thread has changed for those that start later

        def start() -> Future[Any] | None:
            try:
                batch = next(waiting)
            except StopIteration:
                return None
            except Exception as error:
                failed = Future[Any]()
                failed.set_exception(error)
                return failed
            return pool.submit(prepare, batch) if stream is None else pool.submit(stream.run, prepare, batch)

        following = start()
        while following is not None:
            current, following = following, start()
            yield current.result() if stream is None else stream.receive(*current.result())
    finally:
        pool.shutdown(cancel_futures=True)  # waits for the batch in work, but not for the one after it


def _use_one_core() -> None:
    """Let this thread compute by itself: the caller computes with all cores."""
    torch.get_num_threads()  # its first call in a thread sets the number to the process's
    torch.set_num_threads(1)


class _PrefetchStream:
    """A stream of a GPU, whose results another stream uses."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        # What `prepare` reads was written by the current stream, before.
        self._stream.wait_stream(torch.cuda.current_stream(device))

    def run(self, prepare: Callable[[Any], Any], batch: Any) -> tuple[Any, torch.cuda.Event]:
        """Prepare a batch, and record when the device will have done its part."""
        with torch.cuda.stream(self._stream):
            return prepare(batch), self._stream.record_event()

    def receive(self, prepared: Any, done: torch.cuda.Event) -> Any:
        """Let the current stream wait for what was prepared, which it may then use."""
        current = torch.cuda.current_stream(self._device)
        current.wait_event(done)
        for tensor in _tensors_of(prepared):
            if tensor.device == self._device:
                tensor.record_stream(current)  # or its memory would be given to the next batch while it is in use
        return prepared


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to a device; to a GPU from pinned memory, so that neither the host nor another stream waits for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _tensors_of(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a data class, in its fields or in theirs."""
    if isinstance(value, Tensor):
        yield value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _tensors_of(getattr(value, field.name))
