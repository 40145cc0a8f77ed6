"""Batches from worker processes: order, errors, and what becomes of a worker that dies or hangs."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from clipcid_cli.errors import ClipcidError
from clipcid_cli.runtime.loading import default_workers, load_batches, read_ahead

# Functions sent to workers are found there by name.


def square(batch: list[int]) -> torch.Tensor:
    time.sleep(0.01 * (batch[0] % 3))  # so that workers finish out of order
    return torch.tensor(batch) ** 2


def refuse_four(batch: list[int]) -> torch.Tensor:
    if 4 in batch:
        raise ClipcidError("four is not allowed", "use five")
    return square(batch)


def die_at_four(batch: list[int]) -> list[int]:
    if 4 in batch:
        os._exit(3)
    return batch


def hang_at_four(batch: list[int]) -> list[int]:
    if 4 in batch:
        time.sleep(60)
    return batch


def list_modules(batch: list[int]) -> list[str]:
    return [name for name in ("faiss", "open_clip", "torch") if name in sys.modules]


def count_to(end: int, taken: list[int]) -> Iterator[list[int]]:
    for number in range(end):
        taken.append(number)
        yield [number, number + 1]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_order_is_that_of_the_batches(workers: int) -> None:
    state = torch.random.get_rng_state()
    found = list(load_batches(count_to(20, []), square, workers))
    assert [batch.tolist() for batch in found] == [[n**2, (n + 1) ** 2] for n in range(20)]
    assert torch.equal(torch.random.get_rng_state(), state)


def test_batches_are_taken_as_they_are_needed() -> None:
    taken: list[int] = []
    loader = load_batches(count_to(1000, taken), square, 1, ahead=2)
    assert next(loader).tolist() == [0, 1]
    assert len(taken) < 10
    loader.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_ours_arrives_as_it_was_raised(workers: int) -> None:
    with pytest.raises(ClipcidError) as raised:
        list(load_batches(count_to(9, []), refuse_four, workers))
    assert (raised.value.message, raised.value.fix) == ("four is not allowed", "use five")


def test_a_worker_that_dies_is_told() -> None:
    with pytest.raises(ClipcidError, match="process that decodes images ended") as raised:
        list(load_batches(count_to(9, []), die_at_four, 1))
    assert "--workers" in raised.value.fix


def test_a_worker_that_hangs_is_told() -> None:
    start = time.monotonic()
    with pytest.raises(ClipcidError, match=r"returned no batch for 2 seconds"):
        list(load_batches(count_to(9, []), hang_at_four, 1, stall_seconds=2))
    assert time.monotonic() - start < 30


def test_workers_are_forked_from_a_server_with_what_they_need_and_no_faiss() -> None:
    import faiss  # noqa: F401  # this process has it; workers must not

    assert next(load_batches([[0]], list_modules, 1)) == ["open_clip", "torch"]


def test_an_interrupt_while_the_server_starts_leaves_no_traceback(tmp_path: Path) -> None:
    script = "from clipcid_cli.runtime.loading import start_worker_server\nstart_worker_server()\ninput()\n"
    program = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    children = Path(f"/proc/{program.pid}/task/{program.pid}/children")
    importing: list[str] = []
    while not importing:
        assert program.poll() is None
        time.sleep(0.01)
        importing = [pid for pid in children.read_text().split() if "torch" in Path(f"/proc/{pid}/maps").read_text()]
    for _ in range(10):  # a library may swallow one
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(importing[0]), signal.SIGINT)
        time.sleep(0.05)
    _, told = program.communicate("\n", timeout=60)
    assert (program.returncode, told) == (0, "")


def test_workers_are_fewer_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(96)), raising=False)
    assert (default_workers(cpu), default_workers(gpu)) == (8, 95)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert (default_workers(cpu), default_workers(gpu)) == (8, 11)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert (default_workers(cpu), default_workers(gpu)) == (1, 1)


def write_pid_and_wait(batch: str) -> str:
    Path(batch).write_text(str(os.getpid()))
    time.sleep(60)
    return batch


def test_workers_end_with_a_main_process_that_was_killed(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    script = (
        "from clipcid_cli.runtime.loading import load_batches\n"
        "from test_loading import write_pid_and_wait\n"
        f"if __name__ == '__main__':\n    list(load_batches(['{pid_file}'], write_pid_and_wait, 1))\n"
    )
    (tmp_path / "main.py").write_text(script)
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
    main = subprocess.Popen([sys.executable, str(tmp_path / "main.py")], env=os.environ | {"PYTHONPATH": paths})
    while not pid_file.exists() or not pid_file.read_text():
        assert main.poll() is None
        time.sleep(0.05)
    main.send_signal(signal.SIGKILL)
    main.wait()
    worker = int(pid_file.read_text())
    deadline = time.monotonic() + 10
    while Path(f"/proc/{worker}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{worker}").exists()


def test_items_are_read_ahead_in_order_and_errors_come_in_their_place() -> None:
    begun: list[int] = []

    def numbers() -> Iterator[int]:
        for number in range(20):
            begun.append(number)
            yield number
        raise ClipcidError("the end is missing", "look for it")

    taken = read_ahead(numbers(), 3)
    assert next(taken) == 0
    end = time.monotonic() + 5
    while len(begun) < 5 and time.monotonic() < end:  # three that wait, and one in hand
        time.sleep(0.005)
    time.sleep(0.05)
    assert begun == [0, 1, 2, 3, 4]
    assert [next(taken) for _ in range(19)] == list(range(1, 20))
    with pytest.raises(ClipcidError, match="the end is missing"):
        next(taken)
    assert begun == list(range(20))


def test_reading_ahead_ends_with_its_reader() -> None:
    before = threading.active_count()
    taken = read_ahead(iter(range(10**9)), 2)
    assert [next(taken) for _ in range(3)] == [0, 1, 2]
    taken.close()  # type: ignore[attr-defined]  # it is a generator
    end = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < end:
        time.sleep(0.01)
    assert threading.active_count() == before
