"""Command lines in forks of a process that has imported everything: loading PyTorch takes longer than most of them.

A fork has its own folder, environment, output and end, as a program that was started has. Forks are made of two processes
in turn, whose hashes of strings differ, so that what depends on the order of a set differs from run to run.

As a program: the process that is forked. It reads a request a line from stdin and answers each with a line.
"""

from __future__ import annotations

import collections
import contextlib
import fnmatch
import functools
import gc
import importlib
import itertools
import json
import os
import pickle
import pkgutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

# What commands import only when they need it, beside the package. The first optimizer of a process imports torch._dynamo.
_IMPORTED = ("jinja2", "matplotlib.figure", "open_clip", "pyarrow.dataset", "torch._dynamo")
# What exports to Hugging Face's form need: it is imported before the first of them.
_IMPORTED_FOR_HF = ("modeling", "processing", "image_processing", "tokenization")

# Libraries read these when they are imported, which has happened where a fork begins.
_READ_AT_IMPORT = ("HF_", "TRANSFORMERS_", "TORCH_", "OMP_", "GOMP_", "MKL_", "PYTHON")


class Started:
    """A command line that runs in one process or in several."""

    def __init__(self, processes: Sequence[tuple[_Parent, int]], outputs: tuple[Path, Path]) -> None:
        self.pids = [pid for _, pid in processes]
        self._parents = dict(zip(self.pids, (parent for parent, _ in processes), strict=True))
        self._codes: dict[int, int] = {}
        self._outputs = outputs

    def poll(self) -> int | None:
        """Return None while a process runs, then 0 or the exit code of the first that failed.

        A signal that ended it is a negative code. Once one of several fails, the others are terminated, as by torchrun.
        """
        for pid in self._list_running():
            code = self._parents[pid].ask({"poll": pid})
            if code is not None:
                self._codes[pid] = code
                if code:
                    self.send_signal(signal.SIGTERM)
        return None if self._list_running() else next((code for code in self._codes.values() if code), 0)

    def wait(self, timeout: float = 300) -> int:
        """Wait for the end of all.

        Raises:
            subprocess.TimeoutExpired: when it takes longer; they are killed.
        """
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                self.send_signal(signal.SIGKILL)
                self.wait()
                raise subprocess.TimeoutExpired("clipcid", timeout, *self.read())
            time.sleep(0.005)
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal to those that have not ended."""
        for pid in self._list_running():
            os.kill(pid, number)  # at worst to a child that has ended and is not collected yet

    def read(self) -> tuple[str, str]:
        """Return what was written to stdout and to stderr."""
        out, err = (path.read_text(encoding="utf-8", errors="replace") for path in self._outputs)
        return out, err

    def _list_running(self) -> list[int]:
        return [pid for pid in self.pids if pid not in self._codes]


class _Parent:
    """A process that is forked; started when it is first asked."""

    def __init__(self, hash_seed: int) -> None:
        self._hash_seed = hash_seed
        self._process: subprocess.Popen[str] | None = None

    def ask(self, request: Mapping[str, object]) -> Any:
        """Send a request and return its answer."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=_parents_environment() | {"PYTHONHASHSEED": str(self._hash_seed)},
                cwd=os.sep,
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        if self._process is not None:
            self._process.communicate()
        self._process = None


_parents = [_Parent(1), _Parent(2)]
_turns = itertools.cycle(_parents)
_folders: list[tempfile.TemporaryDirectory[str]] = []
_meetings: collections.deque[Any] = collections.deque(maxlen=2)
_numbers = itertools.count()


def clean_environment() -> dict[str, str]:
    """Return this process's environment without clipcid's and torchrun's own variables but the cache, and offline."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name == "CLIPCID_CACHE"
        or (not name.startswith(("CLIPCID_", "TORCHELASTIC_")) and name not in {"RANK", "WORLD_SIZE", "LOCAL_RANK"})
    }
    return kept | {
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "100",
        "NO_COLOR": "1",
        "PYTHONWARNINGS": "default",
    }


@functools.cache
def _parents_environment() -> dict[str, str]:
    """Return the environment of the processes that are forked: the same for both, whatever a test sets between."""
    return clean_environment()


def start(
    arguments: Sequence[str],
    cwd: Path,
    environment: Mapping[str, str],
    processes: int = 1,
    *,
    hook: Callable[[], None] | None = None,
    outputs: tuple[Path, Path] | None = None,
) -> Started:
    """Start a command line of clipcid with a whole environment; in several processes, with what torchrun adds to it.

    Args:
        hook: Called in the fork before the program; it is pickled, so its module is imported there.
        outputs: What to write stdout and stderr to, in place of files of its own.

    Raises:
        ValueError: when a variable that libraries read while they are imported has another value than it had then.
    """
    then = _parents_environment()
    late = [name for name in {**then, **environment} if environment.get(name) != then.get(name)]
    if late := [name for name in late if name.startswith(_READ_AT_IMPORT)]:
        raise ValueError(f"{', '.join(late)} would have no effect in a fork: use the fixture `binary`.")
    outputs = outputs or _make_outputs()
    request: dict[str, object] = {
        "arguments": list(arguments),
        "cwd": str(cwd),
        "outputs": [str(path) for path in outputs],
    }
    if hook is not None:
        request |= {"hook": pickle.dumps(hook).hex(), "import_path": sys.path}
    started = []
    for world in _describe_worlds(processes):
        parent = next(_turns)
        started.append((parent, parent.ask(request | {"environment": {**environment, **world}})))
    return Started(started, outputs)


def _make_outputs() -> tuple[Path, Path]:
    if not _folders:
        _folders.append(tempfile.TemporaryDirectory(prefix="forks-", ignore_cleanup_errors=True))
    number = next(_numbers)
    out, err = (Path(_folders[0].name, f"{number}.{name}") for name in ("out", "err"))
    out.touch()
    err.touch()
    return out, err


def _describe_worlds(processes: int) -> list[dict[str, str]]:
    """Return what torchrun puts into the environment of each process of a run."""
    if processes == 1:
        return [{}]
    from torch.distributed import TCPStore

    # The last ones stay: processes of their run talk through them.
    _meetings.append(TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
    world = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_meetings[-1].port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "OMP_NUM_THREADS": "1",
    }
    return [world | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def after_naming(pattern: str, act: Callable[[], None]) -> None:
    """Let this process act once, always at one place: where it opens a file after one of a pattern has got its name."""
    named = ""
    is_over = False

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal named, is_over
        if event == "os.rename" and fnmatch.fnmatch(os.fsdecode(arguments[1]), f"*{pattern}"):
            named = os.fsdecode(arguments[1])
        elif event == "open" and not is_over and os.path.exists(named):
            is_over = True
            act()

    sys.addaudithook(watch)


def close() -> None:
    """End the processes that are forked, and forget what forks wrote."""
    for parent in _parents:
        parent.close()
    while _folders:
        _folders.pop().cleanup()


def _serve() -> None:
    """Fork for each request."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _import_all()
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            if "hf" in request["arguments"]:
                for part in _IMPORTED_FOR_HF:
                    importlib.import_module(f"transformers.models.clip.{part}_clip")
            answer = os.fork()
            if answer == 0:
                answers.close()
                try:
                    _run(**request)
                except BaseException:  # what the program lets through fails; so does Ctrl-C while it ends
                    traceback.print_exc()
                    sys.stdout.flush()
                finally:
                    os._exit(1)
        print(json.dumps(answer), file=answers, flush=True)


def _import_all() -> None:
    """Import every module of the package, and what they import late, so that a command line in a fork waits for none.

    Garbage is not collected meanwhile: imports make 400,000 objects and keep them all.
    """
    import torch
    from PIL import Image

    import clipcid_cli

    gc.disable()
    for module in pkgutil.walk_packages(clipcid_cli.__path__, "clipcid_cli."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name in _IMPORTED:
        importlib.import_module(name)
    if torch.version.cuda is None:  # or it loads CUDA's libraries, which must not be loaded where forks are made
        importlib.import_module("faiss")
    Image.init()
    gc.freeze()
    gc.enable()


def _run(
    arguments: list[str],
    cwd: str,
    environment: dict[str, str],
    outputs: list[str],
    hook: str = "",
    import_path: Sequence[str] = (),
) -> NoReturn:
    """Be the program: its folder, environment, streams and end."""
    from clipcid_cli.cli import main

    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    files = [(os.devnull, os.O_RDONLY), *((path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) for path in outputs)]
    for number, (path, flags) in enumerate(files):
        descriptor = os.open(path, flags, 0o600)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115  # open until the process ends
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False, buffering=1)  # noqa: SIM115
    # Ignored where the tests run in the background of a script.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["clipcid", *arguments]
    if hook:
        sys.path[:] = import_path
        pickle.loads(bytes.fromhex(hook))()
    main()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        _serve()
