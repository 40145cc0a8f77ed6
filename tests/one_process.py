"""Many command lines in one process, since loading PyTorch takes longer than most of them.

As a program: that process. It reads a command line from each line of stdin and answers with a line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

from forks import clean_environment


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one command line did.

    Attributes:
        code: Its exit code; None where it hung, or the process died.
    """

    arguments: tuple[str, ...]
    code: int | None
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON object on stdout."""
        return json.loads(self.out)

    def problems(self) -> list[str]:
        """Return how it breaks the rules of an exit: a known code, one error of two sentences, no traceback, no bug."""
        found = [] if self.code in (0, 1, 2) else [f"exit {self.code}"]
        for mark in ("Traceback", "bug in clipcid", "Interrupted"):
            found += [mark] if mark in self.err + self.out else []
        lines = [line for line in self.err.splitlines() if line.startswith("Error: ")]
        if len(lines) != (self.code in (1, 2)):
            found.append(f"{len(lines)} errors")
        return found

    def __repr__(self) -> str:
        return (
            f"\n$ clipcid {' '.join(self.arguments)}\nexit {self.code}\n--- stdout\n{self.out}\n--- stderr\n{self.err}"
        )


class OneProcess:
    """Runs command lines one after another; one that hangs or dies gives a new process to the next."""

    def __init__(self, patience: float = 30) -> None:
        """Prepare to run.

        Args:
            patience: Seconds after which a command is said to hang, the first one's imports apart.
        """
        self._patience = patience
        self._process: subprocess.Popen[str] | None = None

    def __call__(self, *arguments: object, cwd: Path) -> Outcome:
        """Run one command line in a folder."""
        words = tuple(map(str, arguments))
        patience = self._patience
        if self._process is None or self._process.poll() is not None:
            self._process = _start()
            patience += 60
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"arguments": words, "cwd": str(cwd)}) + "\n")
        self._process.stdin.flush()
        ready, _, _ = select.select([self._process.stdout], [], [], patience)
        line = self._process.stdout.readline() if ready else ""
        if not line:
            self.close()
            return Outcome(words, None, "", "it hung" if not ready else "the process died")
        answer = json.loads(line)
        return Outcome(words, answer["code"], answer["out"], answer["err"])

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
        self._process = None


def _start() -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=clean_environment() | {"CLIPCID_WORKERS": "0", "PYTHONWARNINGS": "ignore"},
        cwd=os.sep,
    )


def _serve() -> None:
    """Run each command line."""
    from clipcid_cli.cli import run

    answers = sys.stdout
    for line in sys.stdin:
        case = json.loads(line)
        _forget_files()
        os.chdir(case["cwd"])
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run(case["arguments"])
        answer = {"code": code, "out": out.getvalue(), "err": err.getvalue()}
        print(json.dumps(answer), file=answers, flush=True)


def _forget_files() -> None:
    """Clear what the modules remember of files by their names: in the next folder another file may have the name."""
    for name, module in list(sys.modules.items()):
        if name.startswith("clipcid_cli."):
            for value in list(vars(module).values()):
                if callable(clear := getattr(value, "cache_clear", None)):
                    clear()


if __name__ == "__main__":
    _serve()
