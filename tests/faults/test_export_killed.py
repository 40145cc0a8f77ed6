"""An export that is killed leaves nothing under a final name, and the same command finishes it."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from conftest import Run, clean_environment, clipcid_command


def visible(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))


def test_killed_export_is_finished_by_the_same_command(
    clipcid: Callable[..., Run], tiny_model: Path, tmp_path: Path
) -> None:
    call = ["export", str(tiny_model), "--format", "open-clip", "--format", "onnx", "--out", "out"]
    running = subprocess.Popen(
        [*clipcid_command(), *call], cwd=tmp_path, env=clean_environment(), stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "out" / ".partial" / "open_clip_model.safetensors").exists():
        assert running.poll() is None, "export ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    running.send_signal(signal.SIGSTOP)  # so that it holds its lock for as long as the second run takes
    second = clipcid(*call, check=False)
    assert second.returncode == 1
    assert "Another run" in second.stderr
    running.kill()
    running.wait()
    assert visible(tmp_path / "out") == []

    clipcid(*call)
    assert visible(tmp_path / "out") == [
        "README.md",
        "export.json",
        "image_encoder.onnx",
        "open_clip_config.json",
        "open_clip_model.safetensors",
        "parity.json",
        "text_encoder.onnx",
    ]
    assert set(json.loads((tmp_path / "out" / "parity.json").read_text())["parity"]) == {"open-clip", "onnx"}
    assert not (tmp_path / "out" / ".partial").exists()
