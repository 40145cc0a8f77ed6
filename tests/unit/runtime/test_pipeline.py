"""Items through processes and threads, and what is told of workers that die or hang."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import torch

from clipcid_cli.errors import ClipcidError
from clipcid_cli.runtime import pipeline
from clipcid_cli.runtime.pipeline import (
    default_workers,
    join_on,
    ordered_map,
    prefetch,
    read_ahead,
    thread_map,
    threads_for_batches,
)

CPU = torch.device("cpu")
Map = Callable[..., Iterator[object]]

WAYS: dict[str, Map] = {
    "here": partial(ordered_map, workers=0),
    "1 process": partial(ordered_map, workers=1),
    "3 processes": partial(ordered_map, workers=3),
    "1 thread": partial(thread_map, threads=1),
    "3 threads": partial(thread_map, threads=3),
    "a step ahead": partial(prefetch, device=CPU),
    "read ahead": lambda function, items: read_ahead(map(function, items), 3),
}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)

# Functions sent to workers are found there by name.


def square(number: int) -> torch.Tensor:
    time.sleep(0.01 * (number % 3))  # so that workers finish out of order
    return torch.full((2,), number) ** 2


def refuse_four(number: int) -> int:
    if number == 4:
        raise ClipcidError("four is not allowed", "use five")
    return number


class TwoPartsError(Exception):
    """One that cannot be received: its class wants another argument than it was sent with."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(one)
        self.two = two


def end_at_four(number: int, how: str) -> int:
    match how if number == 4 else "":
        case "two parts":
            raise TwoPartsError(number, 2)
        case "exit":
            os._exit(3)
        case "signal":
            os.kill(os.getpid(), signal.SIGKILL)
        case "never":
            time.sleep(60)
    return number


def list_modules(_: int) -> list[str]:
    return [name for name in ("faiss", "open_clip", "torch") if name in sys.modules]


def count(end: int, taken: list[int], *, fails: bool = False) -> Iterator[int]:
    for number in range(end):
        taken.append(number)
        yield number
    if fails:
        raise ClipcidError("the end is missing", "look for it")


def wait_until(true: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def end(results: Iterator[object]) -> None:
    """End a map that nobody reads on; in one thread there is nothing to end."""
    if isinstance(results, Generator):
        results.close()


@every_way
def test_results_come_in_the_order_of_the_items_which_are_taken_as_they_are_needed(way: Map) -> None:
    state, threads, taken = torch.random.get_rng_state(), torch.get_num_threads(), list[int]()
    results = way(square, count(1000, taken))
    found = [next(results)]
    assert len(taken) <= 10
    found += islice(results, 19)
    assert [result.tolist() for result in found] == [[number**2] * 2 for number in range(20)]  # type: ignore[attr-defined]
    end(results)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_num_threads() == threads


@every_way
def test_an_error_comes_in_its_place_and_no_thread_outlives_it(way: Map) -> None:
    before = threading.active_count()
    for items, message in ((range(100), "four is not allowed"), (count(4, [], fails=True), "the end is missing")):
        results = way(refuse_four, items)
        assert [next(results) for _ in range(4)] == [0, 1, 2, 3]
        with pytest.raises(ClipcidError, match=message) as raised:
            next(results)
        assert raised.value.fix
        end(results)
    wait_until(lambda: threading.active_count() <= before)


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("exit", r"decoding process ended \(exit code 3\)"),
        ("signal", r"decoding process ended \(killed by SIGKILL\)"),
        ("never", "returned no batch for 1 seconds"),
        ("two parts", r"could not be received \(TypeError: .*two"),
    ],
)
def test_a_worker_that_dies_or_hangs_is_told(how: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "never":
        monkeypatch.setattr(pipeline, "STALL_SECONDS", 1)
    with pytest.raises(ClipcidError, match=told) as raised:
        list(ordered_map(partial(end_at_four, how=how), range(9), 2))
    assert raised.value.fix


def test_a_worker_that_receives_slowly_has_not_stalled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "STALL_SECONDS", 0.4)
    assert list(ordered_map(time.sleep, [1.2], 1, time.monotonic_ns)) == [None]
    with pytest.raises(ClipcidError, match=r"returned no batch for 0\.4 seconds"):
        list(ordered_map(time.sleep, [1.2], 1, threading.get_native_id))


def test_workers_are_forked_from_a_server_with_what_they_need_and_no_faiss() -> None:
    import faiss  # noqa: F401  # this process has it; workers must not

    assert next(ordered_map(list_modules, [0], 1)) == ["open_clip", "torch"]


_MAIN = """
import os, pathlib, sys, time
from clipcid_cli.runtime.pipeline import ordered_map

def write_pid_and_wait(path):
    pathlib.Path(path).write_text(str(os.getpid()))
    time.sleep(60)

if __name__ == "__main__":
    list(ordered_map(write_pid_and_wait, sys.argv[1:], 1))
"""


def test_workers_end_with_a_main_process_that_was_killed_and_say_nothing(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    (tmp_path / "main.py").write_text(_MAIN)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(tmp_path / "main.py"), str(pid_file)]
    main = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: pid_file.exists() and pid_file.read_text() != "", seconds=120)
    main.send_signal(signal.SIGKILL)
    # It ends when all that write there have ended: the worker, its server, the tracker.
    _, told = main.communicate(timeout=60)
    wait_until(lambda: not Path(f"/proc/{pid_file.read_text()}").exists())
    assert told == ""


def test_workers_are_fewer_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(96)), raising=False)
    assert (default_workers(CPU), default_workers(gpu)) == (8, 95)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert (default_workers(CPU), default_workers(gpu)) == (8, 11)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert (default_workers(CPU), default_workers(gpu)) == (1, 1)


def test_several_threads_compute_at_once_and_a_gpu_gets_one() -> None:
    meeting = threading.Barrier(3, timeout=60)

    def compute(number: int) -> int:
        if number < 3:
            meeting.wait()  # passes only when three threads are here
        return number

    assert list(thread_map(compute, range(30), 3)) == list(range(30))
    assert threads_for_batches(torch.device("cuda")) == 1
    assert threads_for_batches(CPU) >= 1


def test_a_batch_is_prepared_while_the_caller_works_on_the_one_before() -> None:
    prepared = [threading.Event() for _ in range(4)]

    def prepare(number: int) -> tuple[int, int, bool]:
        prepared[number].set()
        return number, torch.get_num_threads(), threading.current_thread() is threading.main_thread()

    threads = torch.get_num_threads()
    for expected, (number, there, in_main) in enumerate(prefetch(prepare, range(4), CPU)):
        assert (number, there, in_main) == (expected, 1, False)
        assert torch.get_num_threads() == threads
        if number < 3:
            assert prepared[number + 1].wait(30), "the next one is prepared before the caller asks for it"
        assert not any(event.is_set() for event in prepared[number + 2 :])


@pytest.mark.parametrize("sizes", [[3], [2, 0, 5]])
def test_parts_are_joined(sizes: list[int]) -> None:
    parts = [torch.rand(size, 4) for size in sizes]
    assert torch.equal(join_on(CPU, parts), torch.cat(parts))
