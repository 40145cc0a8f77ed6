"""`balance` killed at random moments, then given again: the bytes of an uninterrupted run."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import clean_environment, clipcid_command, run_command

FILES = ("keep.parquet", "forest.parquet", "curve.csv")


@pytest.mark.slow
def test_killed_at_ten_random_moments_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(20_000, 256))
    rows = centres[generator.integers(20_000, size=60_000)] + 0.4 * generator.normal(size=(60_000, 256))
    embeddings = tmp_path / "emb"
    embeddings.mkdir()
    np.save(embeddings / "img_emb_0.npy", (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16))

    def command(work: str) -> list[str]:
        arguments = ["--embeddings", str(embeddings), "--keep", "0.563", "--work", str(tmp_path / work)]
        return [*clipcid_command(), "balance", *arguments]

    began = time.monotonic()
    run_command(command("whole"), tmp_path, True, 300, None)
    duration = time.monotonic() - began
    moments = random.Random(0)
    for number in range(10):
        process = subprocess.Popen(command(str(number)), env=clean_environment(), stderr=subprocess.DEVNULL)
        time.sleep(moments.uniform(0.2, 1.0) * duration)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        run_command(command(str(number)), tmp_path, True, 300, None)
        for name in FILES:
            expected = (tmp_path / "whole" / "balance" / name).read_bytes()
            assert (tmp_path / str(number) / "balance" / name).read_bytes() == expected, (number, name)
