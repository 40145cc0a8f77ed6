"""`cluster` killed right after it saved its progress, then run again: it continues, to the same bytes."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
from conftest import run_command

# Three runs are forks of one process: undisturbed, killed after its second save, and again. The clock that paces the saves
# is 10,000 times as fast, so that a short run saves before its end; the limit of `finish` is then 300 s.
_PROGRAM = """
import json, time
from pathlib import Path
real = time.monotonic
time.monotonic = lambda: 1e4 * real()
from fault_child import Operations, kill, read_operations, start
import clipcid_cli.steps.cluster
here, log = Path(), Path("log")
def run(work, kill_at=None):
    arguments = ("cluster", "--num-clusters", "32", "--iterations", "4", "--embeddings", "emb", "--work", work)
    return start(arguments, here, Operations(log, kill_at, after=True, act=kill).install).finish(3e6)
runs = [run("whole")]
saves = [n for n, line in enumerate(read_operations(log)) if line.startswith("replace") and "/..progress.npz." in line]
runs += [run("broken", saves[1]), run("broken")]
print(json.dumps([[found.code, found.err] for found in runs]))
"""


def test_cluster_continues_after_its_last_iteration(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(2_000, 64))
    (tmp_path / "emb").mkdir()
    np.save(tmp_path / "emb/img_emb_0.npy", (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16))
    here = Path(__file__).parent
    paths = {"PYTHONPATH": os.pathsep.join(map(str, (here.parents[1], here)))}
    runs = json.loads(run_command([sys.executable, "-c", _PROGRAM], tmp_path, True, 900, paths).stdout)
    assert [code for code, _ in runs] == [0, -9, 0], runs
    assert "Resuming after 2 iterations" in runs[2][1]
    whole, broken = (tmp_path / work / "clusters" for work in ("whole", "broken"))
    assert sorted(path.name for path in broken.iterdir()) == sorted(path.name for path in whole.iterdir())
    for name in ("centroids.npy", "clusters.parquet"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes(), name
