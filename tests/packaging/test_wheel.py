"""A wheel, installed into an empty environment, is the whole program: help, `balance` on foreign embeddings, `export`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from balance_data import make_rows, write_embeddings
from conftest import clean_environment

ROOT = Path(__file__).parents[2]


def run(*command: object, cwd: Path) -> str:
    """Run a command outside the checkout, so that nothing is imported from it; a non-zero exit fails with its output."""
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow  # installs PyTorch and the rest into an environment of its own: minutes
def test_a_wheel_in_an_empty_environment_runs(tmp_path: Path, tiny_model: Path) -> None:
    run(sys.executable, "-m", "build", "--outdir", tmp_path / "dist", ROOT, cwd=tmp_path)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert len(list((tmp_path / "dist").glob("*.tar.gz"))) == 1
    packed = set(zipfile.ZipFile(wheel).namelist())
    sources = subprocess.run(["git", "ls-files", "clipcid_cli"], cwd=ROOT, capture_output=True, text=True, check=True)
    modules = {name for name in sources.stdout.split() if name.endswith((".py", ".html", ".css", ".md", "py.typed"))}
    assert modules <= packed

    run(sys.executable, "-m", "venv", tmp_path / "empty", cwd=tmp_path)
    binaries = tmp_path / "empty" / "bin"
    run(binaries / "pip", "install", "--quiet", f"{wheel}[export]", cwd=tmp_path)
    assert "balance" in run(binaries / "clipcid", "--help", cwd=tmp_path)
    rows = make_rows(200)
    embeddings = write_embeddings(tmp_path / "foreign", rows)
    balanced = json.loads(
        run(binaries / "clipcid", "balance", "--embeddings", embeddings, "--keep", "0.5", "--json", cwd=tmp_path)
    )
    assert balanced["images"] == 200
    assert balanced["kept"] <= 100
    exported = json.loads(
        run(binaries / "clipcid", "export", tiny_model, "--format", "open-clip", "--json", cwd=tmp_path)
    )
    assert all((tmp_path / path).exists() for path in exported["files"].values())
    assert np.isfinite(list(balanced["seconds"].values())).all()
    assert not os.path.samefile(binaries / "clipcid", Path(sys.executable).with_name("clipcid"))
