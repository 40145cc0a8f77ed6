"""Batches prepared by worker processes, in order.

Workers hold no state: a batch is a list of small descriptions, `prepare` turns it into tensors, and what it returns depends
on the batch alone. So the result is the same for any number of workers.

Workers are forked from a server process that has imported PyTorch and the decoders already: a worker starts in
milliseconds, without what the main process has loaded since (a model, CUDA, threads that hold locks).
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import multiprocessing.forkserver
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from clipcid_cli.errors import ClipcidError

Batch = TypeVar("Batch")
Prepared = TypeVar("Prepared")

# What workers need; nothing here may import faiss.
_PRELOAD = [
    "torch",
    "torch.utils.data",
    "torchvision.transforms.functional",
    "open_clip.transform",
    "open_clip.tokenizer",
    "clipcid_cli.formats.samples",
    "clipcid_cli.runtime.encoder",
    "clipcid_cli.runtime.images",
    "clipcid_cli.runtime.loading",
]

STALL_SECONDS = 600.0
"""A batch that takes longer than this to prepare is taken for a stall."""


def default_workers() -> int:
    """Return how many workers to start when the user does not say: one per core beyond the first, at most 8.

    Cores are those this process may use, divided among the processes of this host.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1))


def start_worker_server() -> None:
    """Start the server that workers are forked from, so that its imports run beside the caller's; later calls do nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    multiprocessing.forkserver.ensure_running()


def load_batches(
    batches: Iterable[Batch],
    prepare: Callable[[Batch], Prepared],
    workers: int,
    *,
    ahead: int = 2,
    stall_seconds: float = STALL_SECONDS,
) -> Iterator[Prepared]:
    """Prepare batches, in order.

    Args:
        batches: What to prepare; consumed as workers become free, so it may be a generator over any number of shards. Each
            item is sent to a worker and must be picklable and small (places in files, not their content).
        prepare: Picklable function of one batch. A ClipcidError it raises is raised here.
        workers: Number of worker processes; 0 prepares in this process.
        ahead: Batches that each worker prepares ahead.
        stall_seconds: Time after which a batch that does not come is taken for a stall.

    Yields:
        What `prepare` returned for each batch, in the order of `batches`.

    Raises:
        ClipcidError: when a worker died or stalled, or `prepare` raised one.
    """
    if workers == 0:
        for batch in batches:
            yield prepare(batch)
        return
    start_worker_server()
    loader: DataLoader[Any] = DataLoader(
        _Preparation(prepare),
        # With no batching of its own, the loader hands whatever the sampler yields to a worker as an index.
        batch_size=None,
        sampler=_Items(batches),
        num_workers=workers,
        prefetch_factor=ahead,
        collate_fn=_unchanged,
        multiprocessing_context=multiprocessing.get_context("forkserver"),
        timeout=stall_seconds,
        # The loader draws a seed for its workers; from a generator of its own it leaves the caller's untouched.
        generator=torch.Generator(),
    )
    try:
        for outcome in loader:
            if outcome.error is not None:
                raise outcome.error
            yield outcome.value
    except RuntimeError as error:
        if "DataLoader worker" not in str(error) and "DataLoader timed out" not in str(error):
            raise
        raise _loader_error(error, workers, stall_seconds) from error


def _loader_error(error: RuntimeError, workers: int, stall_seconds: float) -> ClipcidError:
    if "timed out" in str(error):
        return ClipcidError(
            f"No batch came from the {workers} workers for {stall_seconds:.0f} seconds: reading the data stalls.",
            "Look at the disk or network the data is on; --workers 0 reads in the main process.",
        )
    return ClipcidError(
        f"A process that decodes images ended: {' '.join(str(error).split())}",
        "Likely memory ran out, or /dev/shm: use fewer --workers or a smaller --batch-size.",
    )


@dataclasses.dataclass
class _Outcome(Generic[Prepared]):
    """What became of one batch. Errors travel as values: the loader would rewrite a raised one into a traceback."""

    value: Prepared | None
    error: ClipcidError | None


class _Preparation(Dataset[Any]):
    """What runs in a worker."""

    def __init__(self, prepare: Callable[[Any], Any]) -> None:
        self._prepare = prepare

    def __getitem__(self, batch: Any) -> _Outcome[Any]:
        try:
            return _Outcome(self._prepare(batch), None)
        except ClipcidError as error:
            return _Outcome(None, error)


class _Items(Sampler[Any]):
    """The batches, as what the loader takes for indices."""

    def __init__(self, items: Iterable[Any]) -> None:
        self._items = items

    def __iter__(self) -> Iterator[Any]:
        return iter(self._items)


def _unchanged(value: Any) -> Any:
    return value
