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

# The process that is forked, of a program that does one thing.
_SERVE = """
import sys
import forks
from clipcid_cli import cli

def main():
    print("begun")
    {does}

forks._IMPORTED, cli.main = (), main
forks._serve()
"""


@pytest.mark.parametrize(
    ("does", "code", "told"),
    [
        ("raise KeyboardInterrupt", 1, "KeyboardInterrupt"),
        ("raise ValueError('not foreseen')", 1, "ValueError: not foreseen"),
    ],
)
def test_what_a_program_lets_through_fails_its_fork(does: str, code: int, told: str, tmp_path: Path) -> None:
    outputs = [tmp_path / "out", tmp_path / "err"]
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVE.format(does=does)],
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

    pid = ask(arguments=[], cwd=str(tmp_path), environment={}, outputs=list(map(str, outputs)))
    while (found := ask(poll=pid)) is None:
        pass
    process.communicate()
    assert found == code
    out, err = (path.read_text() for path in outputs)
    assert out == "begun\n"
    assert err.strip().endswith(told)
    assert ("Traceback" in err) == bool(told)


def test_forks_are_offline(clipcid: Callable[..., Run], tiny_shards: Path) -> None:
    run = clipcid("embed", tiny_shards, "--model", "hf-hub:clipcid/there-is-none", check=False)
    assert run.returncode == 1
    assert "the hub is disabled (HF_HUB_OFFLINE)" in " ".join(run.stderr.split())


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "OMP_NUM_THREADS"])
def test_what_libraries_read_when_they_are_imported_cannot_be_set(clipcid: Callable[..., Run], name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} would have no effect in a fork"):
        clipcid("--version", env={name: "0"})
