"""Which model is taken, and what is said about it."""

import json
import shutil
from pathlib import Path

import pytest
from sidecars import make_sidecar

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.sidecar import DistillSidecar
from clipcid_cli.steps.models import choose_model
from clipcid_cli.steps.reporting import Reporter


class Listener(Reporter):
    """Keeps notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        """Keep a note."""
        self.notes.append(text)


def test_without_a_name_it_is_the_newest_student(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ClipcidError, match="No model was named"):
        choose_model(None, tmp_path, Listener())
    student = tmp_path / "distill" / "small" / "student"
    shutil.copytree(tiny_model, student)
    (student.parent / "distill.json").write_text(json.dumps(make_sidecar(DistillSidecar)))
    listener = Listener()
    assert choose_model(None, tmp_path, listener).path == student
    assert listener.notes == [f"Model: {student}, the newest student of {tmp_path}."]


def test_a_bare_architecture_gets_its_weights_and_says_so(tmp_path: Path) -> None:
    listener = Listener()
    assert choose_model("ViT-B-32", tmp_path, listener).tag == "laion2b_s34b_b79k"
    assert listener.notes == ["Weights: ViT-B-32:laion2b_s34b_b79k."]


def test_data_in_place_of_the_model_is_recognised(tmp_path: Path) -> None:
    with pytest.raises(ClipcidError, match="was read as the model") as caught:
        choose_model(str(tmp_path), tmp_path, Listener(), positional_of="eval-linear")
    assert caught.value.fix == f"Put the model first: clipcid eval-linear MODEL {tmp_path}"
    # What is neither may be either, misspelt.
    with pytest.raises(ClipcidError, match="no-such-model was read as the model") as caught:
        choose_model("no-such-model", tmp_path, Listener(), positional_of="eval-linear")
    assert "If no-such-model is the data: put the model first" in caught.value.fix
    # Nor is it data where it is of a model, in a form that is not read.
    for name in ("image_encoder.onnx", "open_clip_config.json"):
        folder = tmp_path / name / "folder"
        folder.mkdir(parents=True)
        (folder / name).write_text("{}")
        with pytest.raises(ClipcidError) as caught:
            choose_model(str(folder), tmp_path, Listener(), positional_of="eval-linear")
        assert "was read as" not in caught.value.message
    # A flag names the model only.
    with pytest.raises(ClipcidError) as caught:
        choose_model(str(tmp_path), tmp_path, Listener())
    assert "was read as" not in caught.value.message
