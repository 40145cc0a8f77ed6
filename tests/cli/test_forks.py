"""Command lines that tests fork end and look around as programs that were started."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import forks
import pytest
from conftest import Run

# The process that is forked, of a program that prints a word and is interrupted.
_SERVE = """
import forks
from clipcid_cli import cli

def main():
    print("begun")
    raise KeyboardInterrupt

forks._IMPORTED, cli.main = (), main
forks._serve()
"""


def test_what_a_program_lets_through_fails_its_fork(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(forks.__file__).parent,
    )
    assert process.stdin is not None
    assert process.stdout is not None

    def ask(**request: object) -> int | None:
        print(json.dumps(request), file=process.stdin, flush=True)
        answer: int | None = json.loads(process.stdout.readline())
        return answer

    outputs = [tmp_path / "out", tmp_path / "err"]
    pid = ask(arguments=[], cwd=str(tmp_path), environment={}, outputs=list(map(str, outputs)))
    while (found := ask(poll=pid)) is None:
        pass
    process.communicate()
    assert found == 1
    out, err = (path.read_text() for path in outputs)
    assert out == "begun\n"
    assert err.strip().endswith("KeyboardInterrupt")


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "OMP_NUM_THREADS"])
def test_what_libraries_read_when_they_are_imported_cannot_be_set(clipcid: Callable[..., Run], name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} would have no effect in a fork"):
        clipcid("--version", env={name: "0"})
