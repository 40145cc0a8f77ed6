"""Inputs that do not fit, found before the work: widths, missing data, targets that cannot be written, odd models."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from one_process import OneProcess

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.atomic import validate_writable
from clipcid_cli.runtime.models.names import parse_model, read_config, read_width


@pytest.fixture(scope="module")
def clipcid() -> Iterator[OneProcess]:
    process = OneProcess()
    yield process
    process.close()


def test_rows_of_another_tool_must_have_the_teachers_width(
    clipcid: OneProcess, distill_prepared: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "rows"
    shutil.copytree(distill_prepared / "clipcid-work/embeddings/tiny", folder)
    data = json.loads((folder / "embed.json").read_text())["data"]["spec"]
    (folder / "embed.json").unlink()
    shutil.copy(distill_prepared / "student.json", tmp_path)
    found = clipcid(
        "distill", data, "--teacher", "ViT-B-32", "--student", "student.json", "--embeddings", folder, "--steps", "1",
        cwd=tmp_path,
    )  # fmt: skip
    assert found.code == 1, found
    assert not found.problems(), found
    message = " ".join(found.err.split())
    assert (
        f"The embeddings in {folder} have width 32; those of the teacher ViT-B-32:laion2b_s34b_b79k have 512" in message
    )


def test_the_width_of_a_model_is_known_without_its_weights(tiny_model: Path) -> None:
    assert read_width(parse_model(str(tiny_model))) == 32
    assert read_width(parse_model("ViT-L-14")) == 768
    assert read_width(parse_model("hf-hub:a/b")) is None


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_export_with_data_that_is_nowhere(
    clipcid: OneProcess, tiny_model: Path, tmp_path: Path, dry: list[str]
) -> None:
    found = clipcid("export", tiny_model, "--data", "nowhere", "--format", "open-clip", *dry, cwd=tmp_path)
    assert found.code == 1, found
    assert not found.problems(), found
    assert "nowhere" in found.err


@pytest.mark.parametrize("flag", ["--write-keys", "--write-pairs", "--write-uids"])
@pytest.mark.parametrize("place", ["folder.csv", "file/inside.csv", "file/inside/deeper.csv"])
def test_a_target_that_cannot_be_written_is_found_before_the_search(
    clipcid: OneProcess, distill_prepared: Path, tmp_path: Path, flag: str, place: str
) -> None:
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "file").touch()
    rows = distill_prepared / "clipcid-work/embeddings/tiny"
    found = clipcid("balance", "--keep", "0.5", "--embeddings", rows, flag, place, cwd=tmp_path)
    assert found.code == 1, found
    assert not found.problems(), found
    assert f"Could not write {place}" in found.err
    assert not (tmp_path / "clipcid-work").exists()


def test_a_target_in_folders_to_be_made_is_fine(tmp_path: Path) -> None:
    validate_writable(tmp_path / "a" / "b" / "c.txt")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    "content",
    [
        [],
        "text",
        None,
        {"model_cfg": []},
        {"model_cfg": {"embed_dim": "32", "vision_cfg": {}, "text_cfg": {}}},
        {"model_cfg": {"embed_dim": True, "vision_cfg": {}, "text_cfg": {}}},
        {"model_cfg": {"embed_dim": -4, "vision_cfg": {}, "text_cfg": {}}},
        {"model_cfg": {"embed_dim": 32, "vision_cfg": [], "text_cfg": {}}},
        {"model_cfg": {"embed_dim": 32, "vision_cfg": {}, "text_cfg": {"layers": -1}}},
        {"model_cfg": {"embed_dim": 32, "vision_cfg": {}, "text_cfg": "x"}},
        {"model_cfg": {"embed_dim": 32, "vision_cfg": {}, "text_cfg": {}}, "preprocess_cfg": 3},
        {"model_cfg": {"embed_dim": 32, "vision_cfg": {}, "text_cfg": {}}, "preprocess_cfg": {"resize_mode": "x"}},
    ],
)
def test_a_configuration_of_other_types_is_refused(tmp_path: Path, content: Any) -> None:
    (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
    with pytest.raises(ClipcidError, match="is not an open_clip configuration"):
        read_config(tmp_path)
    with pytest.raises(ClipcidError) as caught:  # of a student, which has no weights
        read_config(tmp_path / "open_clip_config.json")
    assert "weights" not in caught.value.fix


@pytest.mark.parametrize(
    "change",
    [
        {"vision_cfg": {"layers": "two"}},
        {"vision_cfg": {"image_size": [32, "x"]}},
        {"vision_cfg": {"patch_size": 0}},
        {"vision_cfg": {"width": None}},
        {"text_cfg": {"context_length": "12"}},
        {"text_cfg": {"vocab_size": -1}},
        {"text_cfg": {"heads": 3}},
        {"text_cfg": {"hf_model_name": 7}},
        {"text_cfg": {"tokenizer_kwargs": []}},
        {"text_cfg": {"nonsense": 1}},
    ],
)
def test_a_model_whose_configuration_holds_nonsense_is_one_error(
    clipcid: OneProcess, tiny_model: Path, tmp_path: Path, change: dict[str, dict[str, Any]]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    path = model / "open_clip_config.json"
    config = json.loads(path.read_text())
    for part, values in change.items():
        config["model_cfg"][part] |= values
    path.write_text(json.dumps(config))
    found = clipcid("export", model, "--format", "open-clip", cwd=tmp_path)
    assert found.code == 1, found
    assert not found.problems(), found
