"""Batches by threads: the order, the numbers and the errors of one thread."""

import threading
from collections.abc import Iterator

import pytest
import torch

from clipcid_cli.runtime.threads import map_threads, threads_for_batches


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_results_come_in_order_and_are_the_same(threads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 96, generator=generator)
    batches = [torch.randn(1 + number % 7, 96, generator=generator) for number in range(40)]
    found = list(map_threads(batches, lambda batch: batch @ weight, threads))
    assert len(found) == 40
    for batch, result in zip(batches, found, strict=True):
        torch.testing.assert_close(result, batch @ weight, rtol=0, atol=1e-4)


def test_several_batches_are_computed_at_once_and_few_wait() -> None:
    meeting, taken = threading.Barrier(3, timeout=60), []

    def batches() -> Iterator[int]:
        for number in range(30):
            taken.append(number)
            yield number

    def compute(number: int) -> int:
        if number < 3:
            meeting.wait()  # passes only when three threads are here
        return number

    results = map_threads(batches(), compute, 3, ahead=2)
    assert next(results) == 0
    assert len(taken) <= 3 * 2 + 1
    assert list(results) == list(range(1, 30))


def test_an_error_comes_out_and_threads_are_given_back() -> None:
    before = torch.get_num_threads()

    def compute(number: int) -> int:
        if number == 5:
            raise ValueError("the fifth")
        return number

    seen = []
    with pytest.raises(ValueError, match="the fifth"):
        seen.extend(map_threads(range(100), compute, 2))
    assert torch.get_num_threads() == before
    assert threading.active_count() < 20


def test_a_gpu_gets_one_batch_at_a_time() -> None:
    assert threads_for_batches(torch.device("cuda")) == 1
    assert threads_for_batches(torch.device("cpu")) >= 1
