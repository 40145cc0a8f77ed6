"""How many threads a computation gets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

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
