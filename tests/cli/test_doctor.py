"""`clipcid doctor` for real: its figures, that nothing stays, and two processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

from conftest import Clipcid, start_clipcid

from clipcid_cli.runtime import probes
from clipcid_cli.steps.doctor import measure

FIELDS = {"name", "unit", "figure", "needs", "verdict", "formula", "problem", "advice"}


def be_brief() -> None:
    """Let this process measure for so short a time that its figures mean little."""
    probes._SECONDS = 0.02
    measure._SECONDS = 0.1
    measure._WRITTEN = 2**22


def interrupt_while_locked() -> None:
    """Interrupt this process where it takes a lock, and go on a little later."""

    def watch(event: str, _: tuple[Any, ...]) -> None:
        if event == "fcntl.flock":
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)

    sys.addaudithook(watch)


def run_briefly(*words: object, cwd: Path, processes: int = 1) -> tuple[int, dict[str, Any]]:
    started = start_clipcid("doctor", *words, "--json", cwd=cwd, processes=processes, hook=be_brief)
    code = started.wait()
    out, err = started.read()
    assert out, err
    return code, json.loads(out)


def test_a_machine_is_compared_with_the_needs_of_gpus(tmp_path: Path, tiny_shards: Path) -> None:
    data, here = tmp_path / "data", tmp_path / "here"
    shutil.copytree(tiny_shards, data)
    shutil.copy(data / "00000.tar", data / "00002.tar")  # so that keys repeat, which is for the steps to judge
    here.mkdir()
    before = sorted(data.iterdir())
    code, found = run_briefly("--data", data, "--gpus", "999xH100", cwd=here)
    checks = {check["name"]: check for check in found["checks"]}
    assert code == 1
    assert checks["decoding"]["verdict"] == "starves"
    assert checks["decoding"]["figure"] > 0
    assert checks["decoding"]["needs"] == found["images_per_second"]
    assert 5_000 < found["images_per_second"]["ViT-B-32"] < 15_000
    assert checks["locks hold"]["verdict"] == "ok"
    assert {"data, first bytes", "data, reading", "work, new file", "work, writing", "open files"} < checks.keys()
    assert all(check.keys() == FIELDS for check in checks.values())
    assert found["versions"]["torch"]
    assert sorted(data.iterdir()) == before
    assert list(here.iterdir()) == []


def test_two_processes_exchange_gradients_and_keep_each_other_from_a_lock(tmp_path: Path) -> None:
    (tmp_path / "clipcid-work").mkdir()
    _, found = run_briefly(cwd=tmp_path, processes=2)
    checks = {check["name"]: check for check in found["checks"]}
    assert (found["processes"], found["hosts"], found["device"]) == (2, 1, "this CPU")
    assert checks["sum of gradients"]["figure"] > 1e6
    assert checks["sum of gradients"]["needs"].keys() == {"ViT-B-32", "ViT-B-16"}
    assert checks["locks hold"]["verdict"] == checks["versions agree"]["verdict"] == "ok"
    assert "data, reading" not in checks
    assert list(tmp_path.rglob("*")) == [tmp_path / "clipcid-work"]


def test_an_interrupted_run_leaves_no_file(tmp_path: Path) -> None:
    started = start_clipcid("doctor", cwd=tmp_path, hook=interrupt_while_locked)
    assert started.wait() == 130
    assert "Interrupted. Run the same command again." in started.read()[1]
    assert list(tmp_path.iterdir()) == []


def test_data_that_is_not_there_and_gpus_that_are_not_known_are_usage_errors(clipcid: Clipcid) -> None:
    assert "There is no data at" in clipcid("doctor", "--data", "nowhere", code=1).said
    assert "names are H100, H200, A100, L4" in clipcid("doctor", "--gpus", "8xH99", code=2).said
