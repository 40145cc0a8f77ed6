"""Bad input of `clipcid embed`: one clear error within seconds, and nothing under a final name."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Run, make_image, shard_members, start_clipcid, write_tar


def text_for_tar(folder: Path) -> str:
    (folder / "data").mkdir()
    (folder / "data" / "a.tar").write_text("not a tar at all\n" * 50)
    return "data"


def cut_tar(folder: Path) -> str:
    path = write_tar(folder / "data" / "a.tar", shard_members(0, 9))
    path.write_bytes(path.read_bytes()[:7_000])
    return "data"


def no_image(folder: Path) -> str:
    write_tar(folder / "data" / "a.tar", [("1.txt", b"x"), ("2.json", b"{}")])
    return "data"


def no_caption(folder: Path) -> str:
    write_tar(folder / "data" / "a.tar", shard_members(0, 4, captions=False))
    return "data"


def unreadable(folder: Path) -> str:
    write_tar(
        folder / "data" / "a.tar", [("1.png", b"x"), ("1.txt", b"x"), ("2.png", make_image(1)[:99]), ("2.txt", b"y")]
    )
    return "data"


def repeated_keys(folder: Path) -> str:
    for name in ("a", "b"):
        write_tar(folder / "data" / f"{name}.tar", shard_members(0, 3))
    return "data"


def empty_folder(folder: Path) -> str:
    (folder / "data").mkdir()
    return "data"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: "absent", "There is no data at"),
        (empty_folder, "contains no .tar shard and no image"),
        (text_for_tar, "is not a tar file"),
        (cut_tar, "is truncated"),
        (no_image, "no sample with an image"),
        (no_caption, "Add --no-text"),
        (unreadable, "None of the 2 samples"),
        (repeated_keys, "Add --keys shard"),
    ],
)
def test_bad_data(
    make: Callable[[Path], str], message: str, clipcid: Callable[..., Run], tiny_model: Path, tmp_path: Path
) -> None:
    run = clipcid("embed", make(tmp_path), "--model", tiny_model, "--workers", 0, check=False, timeout=60)
    assert run.returncode == 1
    assert message in " ".join(run.stderr.split())
    assert "Traceback" not in run.stderr
    assert run.stdout == ""
    assert not (tmp_path / "clipcid-work" / "embeddings" / "tiny" / "embed.json").exists()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("ViT-L-15", "Close names: "),
        ("./absent", "there is no such folder"),
        ("cut", "could not be loaded"),
        ("bare.json", "without weights"),
    ],
)
def test_bad_models(
    model: str, message: str, clipcid: Callable[..., Run], tiny_model: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_model, tmp_path / "cut")
    weights = tmp_path / "cut" / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    shutil.copy(tiny_model / "open_clip_config.json", tmp_path / "bare.json")
    run = clipcid("embed", tiny_shards, "--model", model, check=False, timeout=60)
    assert run.returncode == 1
    assert message in " ".join(run.stderr.split())
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "clipcid-work").exists()


def test_two_runs_in_one_folder(clipcid: Callable[..., Run], tiny_model: Path, tmp_path: Path) -> None:
    for number in range(40):
        write_tar(tmp_path / "data" / f"{number}.tar", shard_members(10 * number, 10))
    command = ["embed", "data", "--model", str(tiny_model), "--batch-size", "1", "--workers", "0"]
    first = start_clipcid(*command, cwd=tmp_path)
    lock = tmp_path / "clipcid-work" / "embeddings" / "tiny" / ".embed.lock"
    while not lock.exists() or not lock.read_text():
        assert first.poll() is None
        time.sleep(0.002)
    first.send_signal(signal.SIGSTOP)  # stopped, so that it holds the folder while the second one tries
    try:
        second = clipcid(*command, check=False)
    finally:
        first.send_signal(signal.SIGCONT)
        first.wait(60)
    assert second.returncode == 1
    said = " ".join(second.stderr.split())
    assert f"Another run (process {first.pids[0]}) is writing" in said
    assert "write elsewhere (--work, or --out of clipcid embed)" in said
    assert first.poll() == 0
