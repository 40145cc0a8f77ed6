"""`clipcid balance --neighbors partitioned` from the command line: any number of processes, killed and given again."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from balance_data import make_rows, write_embeddings
from conftest import Run, start_clipcid

OUTPUTS = ("keep.parquet", "forest-partitioned.parquet", "curve.csv")


def read_outputs(work: Path) -> dict[str, bytes]:
    return {name: (work / "balance" / name).read_bytes() for name in OUTPUTS}


def test_any_number_of_processes_and_a_killed_run_write_the_same_bytes(
    clipcid: Callable[..., Run], torchrun: Callable[..., Run], tmp_path: Path
) -> None:
    rows = make_rows(5000, width=64)
    write_embeddings(tmp_path / "e", rows, num_files=3)
    arguments = ["balance", "--embeddings", "e", "--keep", "0.6", "--neighbors", "partitioned"]
    run = clipcid(*arguments, "--work", "one")
    audit = " ".join(run.stderr.split())
    assert re.search(
        r"[\d,]+ of [\d,]+ sampled kept images ha\w+ another kept image within the cut-off \([\d.e-]+%", audit
    )
    expected = read_outputs(tmp_path / "one")
    forest = pd.read_parquet(tmp_path / "one" / "balance" / "forest-partitioned.parquet")
    assert len(forest) >= 2000
    assert "The audit compared" in (tmp_path / "one" / "balance" / "report.html").read_text()
    for processes in (2, 3):
        torchrun(processes, *arguments, "--work", str(processes))
        assert read_outputs(tmp_path / str(processes)) == expected

    process = start_clipcid(*arguments, "--work", "killed", cwd=tmp_path)
    while process.poll() is None and not list((tmp_path / "killed" / "balance").glob(".balance-*/.search/*/*.npz")):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "balance" / "keep.parquet").exists()
    clipcid(*arguments, "--work", "killed")
    assert read_outputs(tmp_path / "killed") == expected
    assert not list((tmp_path / "killed" / "balance").glob(".balance-*"))
