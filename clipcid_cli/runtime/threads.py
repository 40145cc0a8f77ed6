"""How many threads a computation gets, and batches computed side by side by threads.

On a CPU, two threads that each take a batch of their own are faster than one batch computed by two threads, which wait
for each other in every layer: a ViT of 4 layers, 128 wide, took 0.63 ms an image against 0.9 to 1.2, ViT-B-32 32 ms against
38 (2 cores with AVX-512), and the embeddings were the same bit for bit. Pillow and PyTorch release Python's lock while
they work, so the threads decode as well, and no process has to start first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Batch = TypeVar("Batch")
Result = TypeVar("Result")

# More threads would wait for Python's lock; on more cores each batch is computed by several.
_MOST_THREADS = 16

# Multiplications in one matrix product below which a second thread gains nothing: logistic regression on 900 × 384 features
# and 50 classes (1.7e7) took 0.83 s with one thread and 0.89 s with two, and many times that with two when another program
# held a core, since every small product waits for the slower thread.
SMALL_PRODUCT = 5e7


@contextmanager
def threads_for(product_size: float) -> Iterator[None]:
    """Run many products of one size on as many threads as gain something.

    Args:
        product_size: Multiplications in one product, e.g. rows × width × classes.
    """
    before = torch.get_num_threads()
    if product_size < SMALL_PRODUCT:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def threads_for_batches(device: torch.device) -> int:
    """Return how many batches to compute at once: one a core on a CPU, one on a GPU, which does not share its time."""
    return min(torch.get_num_threads(), _MOST_THREADS) if device.type == "cpu" else 1


def map_threads(
    batches: Iterable[Batch], compute: Callable[[Batch], Result], threads: int, *, ahead: int = 2
) -> Iterator[Result]:
    """Compute batches by threads, in order.

    Args:
        batches: Consumed by the caller's thread, as threads become free.
        compute: Function of one batch that may run in several threads at once.
        threads: Number of threads; 1 computes in the caller's.
        ahead: Batches that wait for each thread.

    Yields:
        What `compute` returned for each batch, in the order of `batches`. An error it raised is raised here.
    """
    if threads == 1:
        for batch in batches:
            yield compute(batch)
        return
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before // threads))
    waiting: deque[Future[Result]] = deque()
    try:
        with ThreadPoolExecutor(threads, thread_name_prefix="compute") as pool:
            try:
                for batch in batches:
                    waiting.append(pool.submit(compute, batch))
                    if len(waiting) > ahead * threads:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()
    finally:
        torch.set_num_threads(before)
