"""How a run ends that is stopped from outside: signals, full disks, readers and peers that are gone, odd environments."""

import contextlib
import ctypes
import datetime
import functools
import os
import pkgutil
import re
import resource
import shlex
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import click
import forks
import pytest
import torch
from conftest import Clipcid, clean_environment, clipcid_command, free_port, run_command, start_clipcid
from distill_data import SHORT

from clipcid_cli.cli import cli
from clipcid_cli.commands.console import ConsoleReporter, make_console
from clipcid_cli.commands.failures import explain
from clipcid_cli.errors import ClipcidError
from clipcid_cli.runtime import heartbeat, joining
from clipcid_cli.runtime.distributed import open_dist_context
from clipcid_cli.runtime.joining import rendezvous_all
from clipcid_cli.runtime.pipeline import ordered_map

_INTERRUPTED = "Interrupted. Run the same command again to continue where it stopped."
_INTERRUPTED_AFRESH = "Interrupted. Run the same command again."
_INVOKE = ("clipcid_cli.cli:cli", "invoke")


# What runs do in place of their work, in the fork that runs them.


def put(place: str, name: str, function: Callable[..., object]) -> None:
    """Let a function of the package be another one."""
    setattr(pkgutil.resolve_name(place), name, function)


def sleep(*_: object) -> None:
    print("ready", flush=True)
    time.sleep(60)


def sleep_in_a_library(*_: object) -> None:
    """No handler of Python's interrupts such a call."""
    print("ready", flush=True)
    ctypes.CDLL(None).sleep(60)


def sleep_in_workers(*_: object) -> None:
    """Show a bar on the terminal while processes decode."""
    with ConsoleReporter(make_console()).progress("embed", 9, "images"):
        for _ in ordered_map(time.sleep, [0, 60], 1):
            os.write(1, b"ready\n")  # past the bar, which shows what is printed


def lead_workers() -> None:
    """Be the first of a group, to which a terminal sends its signals."""
    os.setsid()
    put(*_INVOKE, sleep_in_workers)


def open_broken_pipe() -> IO[bytes]:
    """Open a pipe that nobody reads, to write to."""
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "wb", buffering=0)


def write_to_nobody(*_: object) -> None:
    with open_broken_pipe() as pipe:
        pipe.write(b"x")


def meet(fate: str) -> None:
    """Meet the other process of the run, and end in some way."""
    rank = int(os.environ["RANK"])
    if fate == "dies between meeting and connecting" and rank == 1:
        rendezvous_all(1, 2)
        os._exit(9)
    joining.RENDEZVOUS_TIMEOUT = datetime.timedelta(seconds=6)
    joining.SILENCE = datetime.timedelta(seconds=1)
    joining._LAST_MEETING = 0.5
    heartbeat._BEATS_A_LIMIT = 5  # rare enough for a process that waits to do nothing
    try:
        with open_dist_context("cpu") as context:
            context.gather(rank)
            if rank == 1:
                end(fate)
            if fate in ("hangs in training", "fails"):
                with context.limited_waits(datetime.timedelta(seconds=1)):
                    torch.distributed.all_reduce(torch.ones(4))  # as gradients are summed
            print(context.gather(rank), flush=True)
    except ClipcidError as error:
        print(error.message, flush=True)
    except OSError as error:
        print(f"OSError: {error}", flush=True)
    os._exit(0)


def end(fate: str) -> None:
    match fate:
        case "dies later":
            os._exit(9)
        case "hangs" | "hangs in training":
            time.sleep(60)
        case "is stopped":
            signal.raise_signal(signal.SIGSTOP)
        case "fails":
            raise OSError(5, "Input/output error", "/data/00007.tar")
        case "works":
            began = time.process_time()
            while time.process_time() < began + 1.5:  # longer than one may be silent
                hash("work")


def wait_until_ready(run: forks.Started) -> None:
    while "ready" not in run.read()[0]:
        assert run.poll() is None, run.read()
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("command", "replaced", "function", "number", "said"),
    [
        ("balance", _INVOKE, sleep, signal.SIGTERM, _INTERRUPTED),
        ("balance", _INVOKE, sleep, signal.SIGINT, _INTERRUPTED),
        ("balance", _INVOKE, sleep_in_a_library, signal.SIGTERM, _INTERRUPTED),
        ("export", ("clipcid_cli.steps.export.run", "_run"), sleep, signal.SIGTERM, _INTERRUPTED_AFRESH),
        (
            "distill --student s --dry-run",
            ("clipcid_cli.steps.distill.run", "run"),
            sleep,
            signal.SIGINT,
            _INTERRUPTED_AFRESH,
        ),
    ],
)
def test_a_signal_ends_the_run_at_once_and_says_how_to_continue(
    command: str, replaced: tuple[str, str], function: Callable[..., None], number: int, said: str, tmp_path: Path
) -> None:
    run = start_clipcid(*command.split(), cwd=tmp_path, hook=functools.partial(put, *replaced, function))
    wait_until_ready(run)
    run.send_signal(number)
    assert run.wait(30) == 128 + number  # of 60 seconds in which it would sleep
    assert run.read()[1].strip() == said


def test_an_interrupted_run_leaves_a_clean_terminal_and_no_worker(tmp_path: Path) -> None:
    ours, theirs = os.openpty()
    outputs = tmp_path / "out", Path(os.ttyname(theirs))
    environment = clean_environment() | {"TERM": "xterm"}
    run = forks.start(["balance"], tmp_path, environment, hook=lead_workers, outputs=outputs)
    while not outputs[0].exists() or "ready" not in outputs[0].read_text():  # not of the terminal, which is read once
        assert run.poll() is None
        time.sleep(0.01)
    os.close(theirs)
    os.killpg(run.pids[0], signal.SIGINT)  # as a terminal does: to the workers and their server as well
    assert run.wait(30) == 130
    shown = b""
    with contextlib.suppress(OSError):  # of a terminal that nobody has open any more: all that wrote to it have ended
        while part := os.read(ours, 1 << 16):
            shown += part
    os.close(ours)
    assert "✗ embed".encode() in shown
    assert shown.replace(b"\r", b"").endswith(f"\n\x1b[?25h{_INTERRUPTED}\n".encode())
    assert b"Traceback" not in shown


def test_a_terminated_distill_saves_its_last_step_and_is_continued_from_it(distill_place: Path) -> None:
    log = distill_place / "clipcid-work/distill/stopped/train.jsonl"
    length = ("--steps", 100_000, "--checkpoint-every", 100_000, "--eval-every", 100_000, "--workers", 1)
    run = start_clipcid("distill", *SHORT, *length, "--name", "stopped", cwd=distill_place, hook=os.setsid)
    while not log.exists() or not log.stat().st_size:
        assert run.poll() is None, run.read()
        time.sleep(0.01)
    os.killpg(run.pids[0], signal.SIGTERM)  # as torchrun does: to the decoding process and its server as well
    code, (_, errors) = run.wait(60), run.read()
    assert code == 143, errors
    (checkpoint,) = (log.parent / "checkpoints").iterdir()
    step = int(checkpoint.stem.removeprefix("step_"))
    assert step > 0
    assert f"Run the same command again to continue from step {step:,}." in errors


@pytest.mark.parametrize(
    ("name", "value"),
    [("WORLD_SIZE", "abc"), ("WORLD_SIZE", "-1"), ("WORLD_SIZE", "٣"), ("RANK", "abc"), ("LOCAL_RANK", "abc")],
)
def test_an_odd_environment_is_a_usage_error(clipcid: Clipcid, name: str, value: str) -> None:
    run = clipcid("--version", check=False, env={name: value})
    assert run.returncode == 2, run
    assert run.stderr.startswith(f"Error: {name} is {value!r}, not a number of processes."), run


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux's device of a full disk")
@pytest.mark.parametrize("arguments", [["--help"], ["balance", "--json", "--keep", "2"]])
def test_a_full_disk_behind_stdout_is_no_traceback(arguments: list[str], binary: Clipcid) -> None:
    with open("/dev/full", "w") as full:
        run = binary(*arguments, check=False, stdout=full)
    assert run.returncode in (1, 2), run
    assert not [mark for mark in ("Traceback", "Exception ignored", "bug") if mark in run.stderr], run


@pytest.mark.parametrize("arguments", [["--help"], ["balance", "--json", "--keep", "0.5"], ["balance", "--keep", "2"]])
def test_a_program_that_nobody_reads_ends_as_others_do(arguments: list[str], binary: Clipcid) -> None:
    with open_broken_pipe() as pipe:
        streams = {"stdout": pipe, "stderr": pipe} if "--json" in arguments else {"stdout": pipe}
        run = binary(*arguments, check=False, **streams)
    # An error is written to stderr, and its code stays; nothing was to be written to stdout.
    assert run.returncode == {"--help": 141, "balance": 1 if "--json" in arguments else 2}[arguments[0]], run
    assert not run.stderr or arguments[-1] == "2", run


def test_a_run_whose_notes_nobody_reads_ends_likewise(binary: Clipcid, tiny_model: Path, tiny_shards: Path) -> None:
    with open_broken_pipe() as pipe:
        run = binary("embed", tiny_shards, "--model", tiny_model, "--workers", 1, check=False, stderr=pipe)
    assert run.returncode == 141, run


@pytest.mark.parametrize(
    ("line", "code", "told"),
    [
        ("--version 2>&-", 0, "clipcid, version"),
        ("--version <&- >&- 2>&-", 0, ""),
        ("balance --keep 2 >&-", 2, "Error: Invalid value for '--keep': 2"),
        ("balance --keep 2 --json 2>&-", 2, '{"error": "Invalid value for'),
    ],
)
def test_a_closed_stream_is_as_good_as_one_that_leads_nowhere(line: str, code: int, told: str, tmp_path: Path) -> None:
    command = ["sh", "-c", f"exec {shlex.quote(clipcid_command()[0])} {line}"]
    run = run_command(command, tmp_path, False, 60, None)
    assert run.returncode == code, run
    assert (run.stdout + run.stderr).startswith(told), run
    assert "Traceback" not in run.stderr, run
    assert "Warning" not in run.stderr, run


def test_another_process_behind_a_broken_pipe_is_told(tmp_path: Path) -> None:
    hook = functools.partial(put, "clipcid_cli.commands.command", "reporting_run", write_to_nobody)
    run = start_clipcid("balance", "--keep", "0.5", cwd=tmp_path, hook=hook)
    assert run.wait() == 1
    assert "a process that this one was writing to has ended (broken pipe)" in run.read()[1]
    assert "bug" not in run.read()[1]


@pytest.mark.parametrize("taken", [False, True])
def test_processes_that_cannot_meet_are_told_within_the_limit(taken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        port = free_port()
        if taken:
            other.bind(("", int(port)))
            other.listen()
        for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": "0", "WORLD_SIZE": "2"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
        missing = r"waited 0\.05 minutes for the other 1 of the run, but not all of them connected"
        in_use = rf"Process 0 could not connect to the other 1 of the run: .*{port}"
        with pytest.raises(ClipcidError, match=in_use if taken else missing):
            rendezvous_all(0, 2, datetime.timedelta(seconds=3))


_MISSED = "Another process of the run has ended, or cannot be reached: "
_SILENT = r"Process 1 of the run showed no sign of work for 0\.0166667 minutes, while the others waited for it\.\n$"
_FAILED = r"OSError: \[Errno 5\] Input/output error: '/data/00007\.tar'"


@pytest.mark.parametrize(
    ("fate", "said", "code"),
    [
        ("dies later", _MISSED, 9),
        ("dies between meeting and connecting", _MISSED, 9),
        pytest.param("hangs", _SILENT, -signal.SIGKILL, marks=pytest.mark.slow),
        ("is stopped", _SILENT, -signal.SIGKILL),
        ("hangs in training", r"Process 1 of the run did not answer: .*[Tt]imed out", -signal.SIGKILL),
        ("fails", rf"Process 1 of the run failed: {_FAILED}\.\n{_FAILED}\n$", 0),
        ("works", r"\[0, 1\]", 0),
    ],
)
def test_a_process_that_is_lost_is_told_and_a_slow_one_waited_for(
    fate: str, said: str, code: int, tmp_path: Path
) -> None:
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2"}
    first, second = (
        start_clipcid("balance", cwd=tmp_path, env=world | {"RANK": str(rank)}, hook=functools.partial(meet, fate))
        for rank in range(2)
    )
    if fate.startswith("hangs") or fate == "is stopped":
        first.wait(150)
        second.send_signal(signal.SIGKILL)
    assert second.wait(60) == code
    assert first.wait(30) == 0
    told = first.read()[0] + second.read()[0]
    assert re.match(said, told), told


def test_a_world_without_a_place_to_meet_is_refused(clipcid: Clipcid, tmp_path: Path) -> None:
    run = clipcid("balance", "--keep", "0.5", "--device", "cpu", check=False, env={"WORLD_SIZE": "2", "RANK": "0"})
    assert run.returncode == 1, run
    assert "the environment does not say where the processes connect" in run.stderr
    assert "bug" not in run.stderr


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "Memory ran out"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "The memory of the GPU ran out: CUDA out of"),
        (OSError(28, "No space left on device", "/x/y"), "The system refused: /x/y: No space left on device."),
        (PermissionError(13, "Permission denied", "/x/y"), "The system refused: /x/y: Permission denied."),
        (ValueError("x"), "ValueError: x"),
    ],
)
def test_what_is_no_bug_is_not_called_one(error: Exception, message: str) -> None:
    found = explain(error)
    assert found.message.startswith(message)
    assert ("bug" in found.fix) == isinstance(error, ValueError)


@pytest.mark.parametrize(
    "command", ["embed", "balance", "cluster", "distill", "eval-zeroshot", "eval-linear", "export"]
)
def test_where_memory_runs_out_the_fix_names_flags_of_the_command(command: str) -> None:
    found = cli.get_command(click.Context(cli), command)
    assert found is not None
    parameters = {option for parameter in found.params for option in parameter.opts}
    for error in (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), MemoryError()):
        fix = explain(error, command).fix
        assert isinstance(error, torch.OutOfMemoryError) == ("GPU" in fix), fix
        named = set(re.findall(r"--[a-z-]+", fix.replace("clipcid embed DATA with a smaller --batch-size", "")))
        assert named, fix
        assert named <= parameters, fix


def test_a_batch_that_does_not_fit_into_memory_is_told_with_the_flag(
    tiny_model: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    limit = 16 * 2**30  # a batch of ten million images of 32 × 32 pixels has 31 GB
    command = ("embed", tiny_shards, "--model", tiny_model, "--batch-size", 10_000_000)
    hook = functools.partial(resource.setrlimit, resource.RLIMIT_AS, (limit, limit))
    run = start_clipcid(*command, cwd=tmp_path, hook=hook)
    code, (_, errors) = run.wait(), run.read()
    assert code == 1, errors
    assert "Error: Memory ran out: " in errors
    assert errors.strip().endswith("Use a smaller --batch-size or fewer --workers; or use a machine with more memory.")
    assert "Traceback" not in errors
