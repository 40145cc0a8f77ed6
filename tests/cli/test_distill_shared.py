"""`distill` shared out: over processes, over parts of a batch, over kills; and what else may change how it computes."""

from __future__ import annotations

import io
import json
import re
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from conftest import Clipcid, kill_when, run_in_two, shard_members, write_benchmark
from distill_data import FULL_PRESETS, SHORT, losses, student_bytes, train_presets
from safetensors.torch import load_file

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.results.run_folder import list_checkpoints
from clipcid_cli.steps.distill import run, trainer
from clipcid_cli.steps.distill.student import Student
from clipcid_cli.steps.distill.trainer import Trainer
from clipcid_cli.steps.distill.training_batch import TrainingBatch
from clipcid_cli.training.gradients import Features

# All losses take a batch in parts in the runs of one process.
SHARED = {"two-gathered": FULL_PRESETS, "two-parts": ("cid", "clip-rd")}
KEPT = ("clip-kd",)  # of a student that has its teacher's text tower


def assert_alike(folder: Path, one: str, other: str) -> None:
    """Check that two runs logged the same losses, gradients and scales to 1e-5."""
    first, second = (losses(folder / "clipcid-work" / "distill" / name) for name in (one, other))
    assert len(first) == len(second) > 0
    for here, there in zip(first, second, strict=True):
        assert here.keys() == there.keys()
        for name, value in here.items():
            assert there[name] == pytest.approx(value, rel=1e-5, abs=1e-5), (one, other, name)


@pytest.fixture(scope="module")
def whole(distill_prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work directory with a run of each full preset, and of CLIP's own loss: one process, whole batches."""
    folder = tmp_path_factory.mktemp("whole")
    shutil.copytree(distill_prepared, folder, dirs_exist_ok=True)
    train_presets(folder, "whole", ("clip", *FULL_PRESETS))
    train_presets(folder, "kept", KEPT, text_tower="teacher")
    (folder / "teacher-like").symlink_to(folder / "clipcid-work" / "distill" / "cid-whole" / "student")
    return folder


@pytest.fixture(scope="module")
def tiny_classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of two classes as CLIP_benchmark lays it out."""
    members = shard_members(0, 6, captions=False, classes=2)
    classnames = "dark\nzebra\n"  # no caption has a zebra
    return write_benchmark(tmp_path_factory.mktemp("benchmark") / "shades", "test", members, classnames=classnames)


def test_parts_of_a_batch_train_as_the_whole(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, encode_part = set[int](), Student._encode

    def encode(student: Student, pixels: torch.Tensor, *others: torch.Tensor) -> Features:
        sizes.add(len(pixels))
        return encode_part(student, pixels, *others)

    monkeypatch.setattr(Student, "_encode", encode)
    train_presets(whole, "parts", accum_freq=4)
    assert sizes == {2}  # of batches of 8
    for preset in FULL_PRESETS:
        assert_alike(whole, f"{preset}-whole", f"{preset}-parts")


def train_as_rank(_: int, folder: Path) -> None:
    train_presets(folder, "two-gathered", SHARED["two-gathered"], local_loss=False)
    train_presets(folder, "two-parts", SHARED["two-parts"], accum_freq=2)
    train_presets(folder, "kept-two", KEPT, text_tower="teacher", accum_freq=2)


def test_two_processes_train_as_one(whole: Path, tmp_path: Path) -> None:
    run_in_two(train_as_rank, tmp_path, whole)
    for way, presets in SHARED.items():
        for preset in presets:
            assert_alike(whole, f"{preset}-whole", f"{preset}-{way}")
    assert_alike(whole, "clip-kd-kept", "clip-kd-kept-two")


@pytest.mark.slow
def test_an_image_tower_beside_the_teachers_text_tower_is_any_students(
    torchrun: Clipcid, clipcid: Clipcid, distill_place: Path, tiny_model: Path, tiny_shards: Path
) -> None:
    """Killed processes go on to the same bits; the student is exported, evaluated, and known by its card."""
    arguments = ["distill", *SHORT[:2], "--text-tower", "teacher", "--batch-size", 8, "--steps", 12]
    arguments += ["--checkpoint-every", 3, "--ema", 0.9]
    torchrun(2, *arguments, "--name", "whole")
    whole, killed = (distill_place / "clipcid-work" / "distill" / name for name in ("whole", "killed"))
    command = (*arguments, "--name", "killed")
    kill_when(killed, "step_*.pt", ("step_00000012.pt", "distill.json"), *command, cwd=distill_place, processes=2)
    torchrun(2, *command)
    assert losses(killed) == losses(whole)
    assert student_bytes(killed) == student_bytes(whole)
    exported = clipcid("export", whole / "student", "--format", "open-clip", "--format", "hf", "--json").json
    assert exported["parity"].keys() == {"open-clip", "hf"}
    card = (distill_place / "clipcid-work" / "export" / "whole" / "README.md").read_text()
    assert "| Text tower | of the teacher, unchanged |" in card
    assert re.search(r"^\| Losses \| .*fd × 2000/D.* \(D: dimensions in which features are compared\) \|$", card, re.M)
    students = [
        clipcid("eval-zeroshot", model, tiny_shards, "--json").json for model in (whole / "student", tiny_model)
    ]
    assert students[0]["metrics"].keys() == students[1]["metrics"].keys()


def test_killed_processes_go_on_to_the_same_bits(torchrun: Clipcid, distill_place: Path) -> None:
    arguments = ["distill", *SHORT, "--steps", 12, "--checkpoint-every", 3, "--color-jitter", 0.3]
    arguments += ["--cluster-towers", "both", "--loss", "mfd=1", "--loss", "afd=1", "--ema", 0.9]
    torchrun(2, *arguments, "--name", "whole")
    whole, killed = (distill_place / "clipcid-work" / "distill" / name for name in ("whole", "killed"))
    # A worker's queue runs ahead of the steps: it must leave no trace.
    command = (*arguments, "--name", "killed", "--workers", 1)
    kill_when(killed, "step_*.pt", ("step_00000012.pt", "distill.json"), *command, cwd=distill_place, processes=2)
    assert "Resuming at step" in torchrun(2, *arguments, "--name", "killed").stderr
    assert losses(killed) == losses(whole)
    weights = [f"{name}/open_clip_model.safetensors" for name in ("student", "student-ema")]
    for path in (*weights, "checkpoints/step_00000012.pt", "results.jsonl"):
        assert (killed / path).read_bytes() == (whole / path).read_bytes(), path


def stop_at_step(patch: pytest.MonkeyPatch, number: int) -> None:
    """Let training end with an error before a step."""
    make_step = Trainer.make_step

    def stop(trainer: Trainer, batch: TrainingBatch) -> None:
        if trainer.state.step == number:
            raise ClipcidError("The run ends early.", "")
        make_step(trainer, batch)

    patch.setattr(Trainer, "make_step", stop)


def test_there_is_a_checkpoint_after_some_minutes_whatever_the_steps(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = whole / "clipcid-work" / "distill"
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "_SECONDS_BETWEEN_CHECKPOINTS", 0.0)
        stop_at_step(patch, 4)
        with pytest.raises(ClipcidError, match="ends early"):
            train_presets(whole, "timed", ("clip",), checkpoint_every=1000)
    assert list_checkpoints(runs / "clip-timed" / "checkpoints") == [3, 4]
    train_presets(whole, "timed", ("clip",), checkpoint_every=1000)
    assert student_bytes(runs / "clip-timed") == student_bytes(runs / "clip-whole")


def test_a_run_goes_on_with_other_data_sets_and_looks_at_the_data_no_more(
    whole: Path, tiny_classes: Path, tiny_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is measured may change where a run is resumed; its report shows each data set where it was measured."""
    looks, look = list[None](), run.validate_samples

    def count(*given: Any, **options: Any) -> None:
        looks.append(None)
        look(*given, **options)

    monkeypatch.setattr(run, "validate_samples", count)
    given = {"eval_every": 2, "checkpoint_every": 2, "ema": 0.9}
    for step, num_looks in ((0, 1), (4, 2)):  # until there is a checkpoint, each start looks
        with monkeypatch.context() as patch:
            stop_at_step(patch, step)
            with pytest.raises(ClipcidError, match="ends early"):
                train_presets(whole, "other-data", ("clip",), eval_data=(str(tiny_classes),), **given)
        assert len(looks) == num_looks
    train_presets(whole, "other-data", ("clip",), eval_data=(str(tiny_shards),), with_report=True, **given)
    assert len(looks) == 2
    report = (whole / "clipcid-work" / "distill" / "clip-other-data" / "report.html").read_text()
    shown = report.partition("Zero-shot metrics during training")[2]
    drawn = re.findall(r">([^<>]+ (?:acc1|image R@1)(?:, EMA)?)<", shown)
    own = [f"{tiny_classes.name} acc1", f"{tiny_shards.name} image R@1"]
    assert sorted(drawn) == sorted([*own, *(f"{name}, EMA" for name in own)])


def test_images_decoded_at_a_reduced_size_make_another_run(whole: Path) -> None:
    with pytest.raises(ClipcidError, match=r"settings\.fast_decode: false there, true now"):
        train_presets(whole, "whole", ("clip",), fast_decode=True)


def test_clusters_teach_both_towers_where_they_know_captions_and_no_frozen_one(whole: Path) -> None:
    runs, teacher = whole / "clipcid-work" / "distill", whole / "teacher-like"
    for towers in ("auto", "image"):
        train_presets(whole, towers, ("cid",), cluster_towers=towers)
        train_presets(
            whole, f"{towers}-frozen-text", ("cid",), cluster_towers=towers, init_from=str(teacher), freeze_text=True
        )
    train_presets(whole, "auto-frozen-image", ("cid",), init_from=str(teacher), freeze_image=True)
    assert losses(runs / "cid-auto") == losses(runs / "cid-whole")
    assert losses(runs / "cid-image") != losses(runs / "cid-whole")
    assert losses(runs / "cid-auto-frozen-text") == losses(runs / "cid-image-frozen-text")
    before = load_file(teacher / "open_clip_model.safetensors")
    for tower in ("image", "text"):
        after = load_file(runs / f"cid-auto-frozen-{tower}" / "student" / "open_clip_model.safetensors")
        for key, tensor in before.items():
            is_frozen = key != "logit_scale" and key.startswith("visual.") == (tower == "image")
            assert torch.equal(after[key], tensor) == is_frozen, key


def test_data_sets_are_measured_while_it_trains(whole: Path, tiny_classes: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train_presets(whole, "measured", ("clip",), eval_data=(str(tiny_classes),), report_to="tensorboard")
    run = whole / "clipcid-work" / "distill" / "clip-measured"
    results = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    assert [line["step"] for line in results] == [0, 6]
    assert all(0 <= line[f"{tiny_classes.name}/acc1"] <= 1 for line in results)
    # Measuring changes nothing of what is learned.
    assert losses(run) == losses(run.parent / "clip-whole")
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    shown = {event.step: event.value for event in board.Scalars("train/loss_clip")}
    logged = {line["step"]: line["loss_clip"] for line in losses(run)}
    assert shown == pytest.approx(logged, rel=1e-6)
    assert [event.step for event in board.Scalars(f"eval/{tiny_classes.name}/acc1")] == [0, 6]


@pytest.mark.slow  # wandb and what it needs are 100 MB
def test_weights_and_biases_keeps_what_the_logs_hold(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="needs pip install '.[wandb]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    train_presets(whole, "shown", ("clip",), report_to="wandb")
    run = whole / "clipcid-work" / "distill" / "clip-shown"
    (path,) = run.glob("wandb/offline-run-*/run-*.wandb")
    assert (run / "wandb" / "run-id").read_text() in path.name
    kept = path.read_bytes()  # protocol buffers, whose values are JSON
    assert all(json.dumps(line["loss_clip"]).encode() in kept for line in losses(run))
    assert b"eval/" in kept


def test_a_run_ends_with_what_eval_zeroshot_writes(
    torchrun: Clipcid, clipcid: Clipcid, distill_place: Path, tiny_classes: Path, tiny_shards: Path
) -> None:
    given = ("distill", *SHORT, "--preset", "clip", "--steps", 2, "--name", "run")
    named = ("--eval-data", tiny_classes, "--eval-data", tiny_shards, "--eval-data", tiny_classes)
    folder, run = distill_place / "clipcid-work" / "eval", distill_place / "clipcid-work" / "distill" / "run"
    # Killed once the student is there: what is left to measure is measured when the command is given again.
    kill_when(folder.parent, "distill.json", ("*_zeroshot_*.json",), *given, *named, cwd=distill_place, processes=2)
    student = student_bytes(run)
    ended = torchrun(2, *given, *named, "--json").json
    assert student_bytes(run) == student
    assert [one["dataset"] for one in ended["evaluations"]] == ["shades", tiny_shards.name]

    written = {path.name: path.read_bytes() for path in folder.glob("*.json")}
    folder.rename(folder.with_name("eval-of-distill"))
    alone = clipcid("eval-zeroshot", ended["student"], tiny_classes, tiny_shards, "--json").json
    assert {path.name: path.read_bytes() for path in folder.glob("*.json")} == written
    measured = ("metrics", "intervals", "prompts", "customary", "images", "skipped", "files")
    for one, other in zip(ended["evaluations"], alone["results"], strict=True):
        assert {name: one[name] for name in measured} == {name: other[name] for name in measured}
    again = clipcid(*given, *named)
    assert again.stderr.count("already holds") == 2
    # Metrics of an earlier student are in the way of another one of its name before it is trained.
    (run / "distill.json").unlink()
    for more in ((), ("--dry-run",)):
        assert "holds metrics of an earlier student" in clipcid(*given, *named, *more, code=1).said
    replaced = clipcid(*given, *named, "--overwrite", "--json").json
    assert not any(one["reused"] for one in replaced["evaluations"])


def test_flags_that_reach_data_sets(whole: Path, tiny_classes: Path, tmp_path: Path) -> None:
    """How much may be unusable is said for all data; how a list is read, for the training data alone."""
    damaged = shutil.copytree(tiny_classes, tmp_path / "damaged")
    with tarfile.open(damaged / "test" / "0.tar", "a") as tar:
        for name, content in (("x.png", b"no image"), ("x.cls", b"0")):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    with pytest.raises(ClipcidError, match=r"1 of 7 samples in .* cannot be used"):
        train_presets(whole, "few", ("clip",), eval_data=(str(damaged),))
    train_presets(whole, "many", ("clip",), eval_data=(str(damaged),), max_bad_fraction=0.2)
    results = (whole / "clipcid-work" / "distill" / "clip-many" / "results.jsonl").read_text()
    assert "damaged/acc1" in results
    (skipped,) = (whole / "clipcid-work" / "eval" / "sidecars").glob("damaged_*many*.skipped.parquet")
    assert pq.read_table(skipped).to_pylist() == [{"key": "x", "shard": "0", "reason": "unreadable_image"}]
    named = tmp_path / "named.csv"
    named.write_text("picture,title\n0.png,a\n")
    with pytest.raises(ClipcidError, match=r"^--eval-data: .*filepath") as refused:
        train_presets(whole, "list", ("clip",), eval_data=(str(named),), image_column="picture")
    assert f"measure it after the training: clipcid eval-zeroshot MODEL {named}" in refused.value.fix
    average, other = (shutil.copytree(tiny_classes, tmp_path / name) for name in ("ema", tiny_classes.name))
    for data, message in (
        ((average,), "is called ema, the name of the weight average in the log"),
        ((tiny_classes, other), "both called shades"),
    ):
        with pytest.raises(ClipcidError, match=message):
            train_presets(whole, "twice", ("clip",), eval_data=tuple(map(str, data)))


def test_dry_run_measures_and_writes_nothing(clipcid: Clipcid, distill_place: Path) -> None:
    run = clipcid("distill", *SHORT, "--epochs", 3, "--workers", 1, "--dry-run", "--json")
    assert "checked 2 of 2 shards, 6 samples: all can be decoded." in run.stderr
    found = run.json
    assert found["steps"] * 8 == found["samples"] <= 3 * 24
    assert found["seconds_per_step"] > 0
    pace = max(found["seconds_per_step"], found["data_seconds_per_step"])  # one worker
    assert found["seconds"]["train"] == pytest.approx(pace * found["steps"], rel=0.1)
    supply, demand = found["data_samples_per_second"], 8 / found["seconds_per_step"]
    assert (found["bound_by"] == "data") == (supply < 1.01 * demand)
    assert "256 px" not in run.said, "the images are smaller than that"
    assert found["memory_bytes"] > 4 * found["parameters"]
    assert found["host_memory_bytes"] > found["shared_memory_bytes"]


@pytest.mark.slow  # PyTorch's compiler takes most of a minute
def test_compiled_towers_learn_the_same(whole: Path) -> None:
    train_presets(whole, "compiled", ("clip",), torchcompile=True)
    assert_alike(whole, "clip-whole", "clip-compiled")


@pytest.mark.slow  # as above
def test_compiler_that_fails_is_one_clear_error(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.config

    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(whole / "cache"))
    torch._dynamo.reset()
    with pytest.raises(ClipcidError, match="--torchcompile"):
        train_presets(whole, "uncompiled", ("clip",), torchcompile=True, batch_size=4)
