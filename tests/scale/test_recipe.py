"""The recipe that measures scale runs through, on data that fills no cache."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import clean_environment

RECIPE = Path(__file__).parents[2] / "recipes" / "scale"


@pytest.mark.slow
def test_the_recipe_measures_every_step(tmp_path: Path) -> None:
    sizes = ["--sizes", "1k", "2k", "--shard-size", "500", "--processes", "2", "--num-clusters", "64"]
    command = [sys.executable, str(RECIPE / "chain.py"), *sizes, "--scratch", str(tmp_path)]
    run = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=3000)
    assert run.returncode == 0, run.stdout + run.stderr
    runs = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    steps = {"index", "embed", "embed again", "balance exact", "balance partitioned", "cluster"}
    steps |= {"distill clip-kd", "distill cid", "distill again"}
    measured = {(taken["step"], taken["pairs"]) for taken in runs}
    assert measured == {(step, pairs) for step in steps for pairs in (1000, 2000)}
    for taken in runs:
        assert all(peak["anonymous"] > 10**7 and peak["files"] > 2 for peak in taken["peaks"].values()), taken
        assert taken["peaks"].keys() >= {"first", "others"}, taken
    # Data and work directories are gone; the log and the teacher stay.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl", "teacher-16"]
