"""Batches prepared a step ahead, in a thread: in order, errors in their place, and no thread left behind."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from clipcid_cli.errors import ClipcidError
from clipcid_cli.runtime.prefetch import prefetch

CPU = torch.device("cpu")


def prefetch_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_a_batch_is_prepared_while_the_caller_works_on_the_one_before() -> None:
    prepared = [threading.Event() for _ in range(4)]

    def prepare(number: int) -> tuple[int, int, bool]:
        prepared[number].set()
        return number, torch.get_num_threads(), threading.current_thread() is threading.main_thread()

    threads = torch.get_num_threads()
    for expected, (number, there, in_main) in enumerate(prefetch(range(4), prepare, CPU)):
        assert (number, there, in_main) == (expected, 1, False)
        assert torch.get_num_threads() == threads
        if number < 3:
            assert prepared[number + 1].wait(30), "the next one is prepared before the caller asks for it"
        assert not any(event.is_set() for event in prepared[number + 2 :])
    assert prefetch_threads() == []


@pytest.mark.parametrize("where", ["batches", "prepare"])
def test_an_error_comes_in_the_place_of_its_batch(where: str) -> None:
    def batches() -> Iterator[int]:
        yield from range(2)
        if where == "batches":
            raise ClipcidError("third", "fix")
        yield 2

    def prepare(number: int) -> int:
        if number == 2:
            raise ClipcidError("third", "fix")
        return number

    taken = prefetch(batches(), prepare, CPU)
    assert [next(taken), next(taken)] == [0, 1]
    with pytest.raises(ClipcidError, match="third"):
        next(taken)
    assert prefetch_threads() == []


def test_closing_waits_for_the_batch_in_work_and_ends_the_thread() -> None:
    done = list[int]()
    second_began = threading.Event()

    def prepare(number: int) -> int:
        if number == 1:
            second_began.set()
        time.sleep(0.05)
        done.append(number)
        return number

    taken = prefetch(range(10**9), prepare, CPU)
    assert next(taken) == 0
    assert second_began.wait(30)
    taken.close()
    assert prefetch_threads() == []
    assert done == [0, 1]


def test_an_interrupt_waits_for_the_batch_in_work_alone() -> None:
    done = list[int]()

    def prepare(number: int) -> int:
        time.sleep(0.1)
        if number == 0:
            signal.pthread_kill(main, signal.SIGINT)
        time.sleep(0.1)
        done.append(number)
        return number

    main = threading.main_thread().ident
    assert main is not None
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            next(prefetch(range(10**9), prepare, CPU))
    finally:
        signal.signal(signal.SIGINT, before)
    assert prefetch_threads() == []
    assert done == [0]
