"""Model folders from strangers: nothing in them is run, and what their configurations claim takes no memory."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import shard_members, write_tar
from hostile_place import Place, few

_FOREIGN = """
import pathlib
pathlib.Path("foreign-code-ran").touch()
from transformers import CLIPTokenizer, PretrainedConfig, PreTrainedModel
class Foreign(CLIPTokenizer):
    pass
class ForeignConfig(PretrainedConfig):
    model_type = "foreign"
class ForeignModel(PreTrainedModel):
    config_class = ForeignConfig
"""


_AS_MANY = 2**23  # bytes: weights of fewer than the model's parameters are not read


class _Payload:
    """Runs a command where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, ("touch foreign-pickle-ran",)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    place = Place(tmp_path / "place")
    write_tar(place.data / "0.tar", shard_members(0, 4))
    return place


def copy_model(tiny_model: Path, place: Place, change: Callable[[dict[str, Any]], object]) -> Path:
    """Copy a model with a changed configuration."""
    folder = place.data / "model"
    shutil.copytree(tiny_model, folder)
    path = folder / "open_clip_config.json"
    config = json.loads(path.read_text())
    change(config["model_cfg"])
    path.write_text(json.dumps(config))
    return folder


def add_code(folder: Path) -> None:
    """Put Python beside the model, and name it wherever transformers looks for it."""
    (folder / "foreign.py").write_text(_FOREIGN)
    names = {"AutoTokenizer": ["foreign.Foreign", None], "AutoConfig": "foreign.ForeignConfig"}
    names |= {"AutoModel": "foreign.ForeignModel"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": names, "tokenizer_class": "Foreign"}))
    (folder / "config.json").write_text(json.dumps({"auto_map": names, "model_type": "foreign"}))


@pytest.mark.parametrize(
    "kwargs",
    few(
        1,
        [
            {"trust_remote_code": True},
            {"trust_remote_code": "yes", "use_fast": False},
            {"code_revision": "main", "trust_remote_code": 1},
        ],
    ),
)
def test_the_code_of_a_tokenizer_is_not_run(place: Place, tiny_model: Path, kwargs: dict[str, Any]) -> None:
    def change(config: dict[str, Any]) -> None:
        config["text_cfg"] |= {"hf_tokenizer_name": "someone/foreign", "tokenizer_kwargs": kwargs}

    model = copy_model(tiny_model, place, change)
    add_code(model)
    outcome = place.run("embed", place.data, "--model", model)
    assert not outcome.problems(), outcome
    assert not list(place.root.rglob("foreign-code-ran")), outcome


def test_the_code_of_a_text_tower_is_not_run(place: Place, tiny_model: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        config["text_cfg"] = {
            "hf_model_name": "someone/foreign",
            "hf_tokenizer_name": "someone/foreign",
            "hf_model_config": {"trust_remote_code": True},
            "hf_proj_type": "mlp",
        }

    model = copy_model(tiny_model, place, change)
    add_code(model)
    outcome = place.run("embed", place.data, "--model", model)
    assert not outcome.problems(), outcome
    assert not list(place.root.rglob("foreign-code-ran")), outcome


@pytest.mark.parametrize("name", few(1, ["open_clip_pytorch_model.bin", "model.pth"]))
def test_weights_are_not_unpickled(place: Place, tiny_model: Path, name: str) -> None:
    model = copy_model(tiny_model, place, lambda config: None)
    (model / "open_clip_model.safetensors").unlink()
    (model / name).write_bytes(pickle.dumps({"visual.proj": _Payload(), "more": bytes(_AS_MANY)}))
    outcome = place.run("embed", place.data, "--model", model)
    assert not outcome.problems(), outcome


_ABSURD: dict[str, Callable[[dict[str, Any]], object]] = {
    "layers": lambda config: config["vision_cfg"].update(layers=10**9),
    "width": lambda config: config["vision_cfg"].update(width=2**22),
    "context": lambda config: config["text_cfg"].update(context_length=10**8),
    "layers of the text tower": lambda config: config["text_cfg"].update(layers=10**7),
    "image size": lambda config: config["vision_cfg"].update(image_size=10**9),
    "embedding": lambda config: config.update(embed_dim=10**12),
    "vocabulary": lambda config: config["text_cfg"].update(vocab_size=10**12),
    "patches": lambda config: config["vision_cfg"].update(image_size=10**5, patch_size=1),
}


@pytest.mark.parametrize("name", few(3, _ABSURD))
def test_a_configuration_that_claims_too_much_takes_no_memory(place: Place, tiny_model: Path, name: str) -> None:
    model = copy_model(tiny_model, place, _ABSURD[name])
    outcome = place.run("embed", place.data, "--model", model)
    assert not outcome.problems(), outcome
    assert outcome.run.returncode == 1, outcome


_HEADERS = {
    "a header of a terabyte": struct.pack("<Q", 2**40) + b"{}",
    "a tensor of an exabyte": b'{"visual.proj":{"dtype":"F32","shape":[1000000000,250000000],"data_offsets":[0,8]}}',
    "brackets": b'{"a":' + b"[" * 100_000,
    "sizes that overflow": b'{"a":{"dtype":"F32","shape":[4294967296,4294967297],"data_offsets":[0,16]}}',
}


@pytest.mark.parametrize("name", few(1, _HEADERS))
def test_weights_that_claim_too_much_take_no_memory(place: Place, tiny_model: Path, name: str) -> None:
    model = copy_model(tiny_model, place, lambda config: None)
    header = _HEADERS[name]
    if not name.startswith("a header"):
        header = struct.pack("<Q", len(header)) + header + bytes(16)
    (model / "open_clip_model.safetensors").write_bytes(header + bytes(_AS_MANY))
    outcome = place.run("embed", place.data, "--model", model)
    assert not outcome.problems(), outcome
    assert outcome.run.returncode == 1, outcome


def test_python_files_in_a_folder_of_data_are_not_run(place: Place, tiny_model: Path) -> None:
    """Processes of Python begin with the current folder on their path; a command started in downloaded data has workers."""
    for name in ("selectors", "pickle", "torch", "numpy", "PIL", "signal", "clipcid_cli", "sitecustomize"):
        (place.data / f"{name}.py").write_text("open('foreign-code-ran', 'w').close()\n")
    words = ("embed", ".", "--model", tiny_model, "--workers", 1)
    outcome = place.run(*words, cwd=place.data, real=True, seconds=60)
    (place.data / "foreign-code-ran").unlink(missing_ok=True)
    problems = [problem for problem in outcome.problems() if not problem.startswith("made data/clipcid-work")]
    assert not problems, outcome
