"""Which model a command means, and how models of one name are told apart."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY_CONFIG, write_tiny_model
from sidecars import make_sidecar

from clipcid_cli import typed
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.files import write_json
from clipcid_cli.formats.results.run_folder import DistillSidecar
from clipcid_cli.runtime.models.names import parse_model
from clipcid_cli.steps.distill.stored import validate_teacher_names
from clipcid_cli.steps.distill.student import load_student
from clipcid_cli.steps.models import choose_model, tell_apart
from clipcid_cli.steps.settings.distill import DistillSettings


def test_model_folders_of_one_name_have_names_of_their_own(tmp_path: Path) -> None:
    first = write_tiny_model(tmp_path / "first" / "tiny")
    second = shutil.copytree(first, tmp_path / "second" / "tiny")
    weights = second / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    link = tmp_path / "link"
    link.symlink_to(first)
    slugs = [name.slug for name in tell_apart([parse_model(str(path)) for path in (first, second, link)])]
    assert slugs[0] == slugs[2] == "tiny", "a model that is named twice is one model"
    assert re.fullmatch(r"tiny-[0-9a-f]{8}", slugs[1])


@pytest.mark.parametrize("name", ["", "student", "student-ema"])
def test_a_run_that_is_unfinished_is_called_so_wherever_its_student_is_named(name: str, tmp_path: Path) -> None:
    config = tmp_path / "student.json"
    config.write_text(json.dumps(TINY_CONFIG))
    run = tmp_path / "distill" / "k4"
    begun = run / f".distill-{'0' * 32}"
    begun.mkdir(parents=True)
    write_json(begun / ".run.json", {"settings": {"steps": 300}, "inputs": []})
    (run / "train.jsonl").write_text(json.dumps({"step": 1, "loss": 3.0}) + "\n")
    spec = str(run / name)
    cpu = torch.device("cpu")
    for use in (
        lambda: choose_model(spec, tmp_path, positional_of="eval-zeroshot"),
        lambda: choose_model(spec, tmp_path),
        lambda: validate_teacher_names(DistillSettings(student=str(config), teacher=(spec,))),
        lambda: load_student(DistillSettings(student=spec), cpu),
        lambda: load_student(DistillSettings(student=str(config), init_from=spec), cpu),
    ):
        with pytest.raises(ClipcidError) as refused:
            use()
        assert refused.value.message == f"The run {run} is unfinished (1 of 300 steps), so it has no student yet."
        assert refused.value.fix == "Run its command again, which finishes it."
    (run / "student").mkdir()
    (run / "student" / "open_clip_config.json").write_text("{}")
    with pytest.raises(ClipcidError) as refused:
        choose_model(spec, tmp_path)
    assert "no student yet" not in refused.value.message


def test_data_in_place_of_a_model_is_told_the_whole_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(typed, "_words", ("clipcid", "eval-zeroshot", "testtar", "farben/test", "--predictions"))
    (tmp_path / "testtar").mkdir()
    data = str(tmp_path / "testtar")
    student = tmp_path / "distill" / "one" / "student"
    student.mkdir(parents=True)
    for model in ("MODEL", str(student)):
        with pytest.raises(ClipcidError, match="was read as the model") as refused:
            choose_model(data, tmp_path, positional_of="eval-zeroshot")
        told = f"Put the model first: clipcid eval-zeroshot {model} testtar farben/test --predictions"
        assert refused.value.fix == told
        with pytest.raises(ClipcidError, match="was read as the model") as refused:
            choose_model(data, tmp_path, positional_of="eval-linear", is_before_data=True)
        assert "model first" not in refused.value.fix
        write_json(student.parent / "distill.json", make_sidecar(DistillSidecar))


def test_a_mistyped_file_is_told_what_lies_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("student.json", "students.txt"):
        Path(name).write_text("{}")
    for typo, advice in (("student.jsn", "a student may also be a .json file"), ("studnet.json", "Check the path.")):
        with pytest.raises(ClipcidError) as refused:
            parse_model(typo)
        assert refused.value.fix.startswith("Close names: student.json. ")
        assert advice in refused.value.fix
