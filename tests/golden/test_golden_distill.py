"""Distilling from the recorded rows: the losses of each step, and the same weights again on the same machine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import kill_when, write_tar
from golden import FLAGS, SHARDS, Arrays, ask, assert_same, check, make_place, plain, read_samples
from safetensors.numpy import load_file

STUDENT = ("distill", SHARDS, "--student", "student.json", "--batch-size", 64)
TAUGHT = (*STUDENT, "--embeddings", "rows")
PRESETS = ("clip", "fd-instance", "cid", "clip-kd", "clip-rd", "clip-td", "dr")
# Captions and images whose views are stored: more than two batches.
FEW = 160
# Fields of train.jsonl that depend on the clock.
TIMED = ("samples_per_second", "data_wait_share", "seconds_")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work directory with a keep list and 64 clusters of the recorded rows, which are the same everywhere."""
    place = make_place(tmp_path_factory.mktemp("distill"))
    ask(place, "balance", "--embeddings", "rows", "--keep", 0.563, "--work", "work")
    ask(place, "cluster", "--embeddings", "rows", "--num-clusters", 64, "--features", "joint", "--work", "work")
    return place


@pytest.fixture
def distill(place: Path) -> Callable[..., Any]:
    """Run a distillation of such a name in the work directory."""
    return lambda name, *arguments, **options: ask(
        place, *TAUGHT, "--work", "work", "--name", name, *arguments, **options
    )


def read_log(run: Path) -> list[dict[str, Any]]:
    """Read what was logged of each step, but for times."""
    lines = [json.loads(line) for line in (run / "train.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith(TIMED)} for line in lines]


def read_weights(run: Path) -> Arrays:
    """Read the weights of the student, and of their average where there is one."""
    folders = sorted(run.glob("student*"))
    weights = {folder.name: load_file(folder / "open_clip_model.safetensors") for folder in folders}
    return {f"{folder}.{name}": tensor for folder, tensors in weights.items() for name, tensor in tensors.items()}


def check_run(case: str, run: Path, answer: Any, rel: float = 1e-4) -> None:
    """Compare losses with those recorded, and the fields of the JSON; 15 held-out samples say too little to compare."""
    log = read_log(run)
    # Norms and scales are sums of what the losses round.
    names = [name for name in log[0] if name.startswith("loss") or name == "lr"]
    answer = plain(answer) | {name: sorted(answer[name]) for name in ("losses", "metrics")}
    result = json.loads((run / "results.jsonl").read_text().splitlines()[-1])
    losses = {name: [line[name] for line in log] for name in names}
    check(case, {"json": answer, "fields": sorted(log[0]), "losses": losses, "measured": sorted(result)}, rel=rel)


def test_the_default_losses(place: Path, distill: Callable[..., Any]) -> None:
    answer = distill("default", "--steps", 20)
    check_run("distill", place / "work" / "distill" / "default", answer)


@pytest.mark.parametrize(("preset", "processes"), [*((preset, 1) for preset in PRESETS), ("cid", 2)])
def test_presets(place: Path, distill: Callable[..., Any], preset: str, processes: int) -> None:
    """Two processes have the losses of one."""
    name = f"{preset}-{processes}"
    answer = distill(name, "--preset", preset, "--steps", 4, processes=processes)
    check_run(f"distill-{preset}", place / "work" / "distill" / name, answer)


def test_losses_of_no_preset(place: Path, distill: Callable[..., Any]) -> None:
    losses = ("instance-intra=1", "mfd=1", "gd=0.001", "afd=1")
    given = [word for loss in losses for word in ("--loss", loss)]
    answer = distill("further", "--preset", "clip", *given, "--optimizer", "adamw", "--steps", 4)
    check_run("distill-further", place / "work" / "distill" / "further", answer)


def test_average_and_parts_killed_and_repeated(place: Path, distill: Callable[..., Any]) -> None:
    settings = ("--ema", 0.9, "--accum-freq", 4, "--steps", 6, "--checkpoint-every", 2)
    answer = distill("run", *settings)
    run = place / "work" / "distill" / "run"
    check_run("distill-ema", run, answer)
    again = (*TAUGHT, "--keep-list", "work/balance/keep.parquet", "--name", "run", *settings, "--work", "killed")
    killed = place / "killed" / "distill" / "run"
    kill_when(killed, "step_*.pt", ("step_00000006.pt", "distill.json"), *again, *FLAGS, cwd=place)
    ask(place, *again)
    found, expected = read_weights(killed), read_weights(run)
    average, student = (
        np.concatenate([tensor.ravel() for name, tensor in expected.items() if name.startswith(f"{folder}.")])
        for folder in ("student-ema", "student")
    )
    check("distill-ema-distance", {"distance": float(np.linalg.norm(average - student))}, rel=1e-3)
    assert_same(found, expected)
    assert read_log(killed) == read_log(run)


def test_stored_views_variants_and_further_texts(place: Path) -> None:
    """From rows of this machine, and so with a larger tolerance."""
    drawn = ("--crop-scale", 0.3, "--color-jitter", 0.4, "--gray-probability", 0.2)
    augmented = ("--views", 2, "--view-kind", "crop,mix", *drawn, "--text-variants", 2)
    write_tar(place / "few" / "0.tar", read_samples(FEW))
    ask(place, "embed", "few", "--model", "teacher", *augmented, "--work", "views")
    student = ("distill", "--student", "student.json", "--batch-size", 64, "--work", "views")
    answer = ask(place, *student, "--name", "views", "--steps", 8)
    check_run("distill-views", place / "views" / "distill" / "views", answer, rel=2e-3)
    weights = read_weights(place / "views" / "distill" / "views")
    assert all(np.isfinite(tensor).all() for tensor in weights.values())
