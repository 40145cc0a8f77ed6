"""Names of models, what a wrong one is told, and what is imported for which."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.results.metrics import metrics_stem
from clipcid_cli.runtime.models.names import (
    DEFAULT_TAGS,
    find_weights,
    known_architectures,
    parse_model,
    read_config,
    read_width,
    with_default_tag,
)
from clipcid_cli.runtime.pipeline import ordered_map


@pytest.mark.parametrize(
    ("spec", "kind", "architecture", "tag", "slug"),
    [
        ("ViT-B-32", "architecture", "ViT-B-32", None, "ViT-B-32"),
        ("ViT-B/32", "architecture", "ViT-B-32", None, "ViT-B-32"),
        ("ViT-B-32:laion2b_s34b_b79k", "tag", "ViT-B-32", "laion2b_s34b_b79k", "ViT-B-32-laion2b_s34b_b79k"),
        ("hf-hub:org/some model", "hub", None, None, "org-some-model-ade32747"),
        ("hf-hub:org/some-model", "hub", None, None, "org-some-model"),
    ],
)
def test_reads_names(spec: str, kind: str, architecture: str | None, tag: str | None, slug: str) -> None:
    name = parse_model(spec)
    assert (name.kind, name.architecture, name.tag, name.slug) == (kind, architecture, tag, slug)


def test_reads_folders(tiny_model: Path, tmp_path: Path) -> None:
    assert parse_model(str(tiny_model)).kind == "folder"
    assert parse_model(f"local-dir:{tiny_model}").path == tiny_model
    assert parse_model(str(tiny_model)).slug == "tiny"
    config = tmp_path / "small.json"
    config.write_text((tiny_model / "open_clip_config.json").read_text())
    assert parse_model(str(config)).kind == "config"
    assert parse_model(str(config)).slug == "small"
    student = tmp_path / "run-7" / "student"
    student.mkdir(parents=True)
    (student / "open_clip_config.json").write_text(config.read_text())
    assert parse_model(str(student)).kind == "config"
    assert parse_model(str(student)).slug == "run-7-student"


@pytest.mark.parametrize(
    "names", [("größe 1", "gräße 1"), ("run 1", "run-1"), ("走", "跑"), (".a", "a."), ("x\u0308", "x")]
)
def test_two_names_of_runs_share_no_file(names: tuple[str, str], tiny_model: Path, tmp_path: Path) -> None:
    for name in names:
        shutil.copytree(tiny_model, tmp_path / name / "student")
    slugs = [parse_model(str(tmp_path / name / "student")).slug for name in names]
    assert len(set(slugs)) == 2
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", slug) for slug in slugs)
    assert names[0] != "größe 1" or re.fullmatch(r"groesse-1-student-[0-9a-f]{8}", slugs[0])
    stems = [metrics_stem(name, "m", "zeroshot_retrieval") for name in names]
    assert len(set(stems)) == 2


def test_the_width_is_known_without_weights(tiny_model: Path) -> None:
    assert [read_width(parse_model(name)) for name in (str(tiny_model), "ViT-L-14", "hf-hub:a/b")] == [32, 768, None]


def test_unknown_names_are_told_what_is_close_and_what_else_works(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ClipcidError, match="no architecture ViT-L-15") as raised:
        parse_model("ViT-L-15")
    assert "ViT-L-14" in raised.value.fix
    assert "local-dir" in raised.value.fix
    with pytest.raises(ClipcidError, match="no such folder"):
        parse_model(str(tmp_path / "absent"))
    with pytest.raises(ClipcidError, match=r"has no open_clip_config\.json"):
        parse_model(str(tmp_path))
    (tmp_path / "student.json").write_text("[]")
    with pytest.raises(ClipcidError, match="is not an open_clip configuration") as caught:
        read_config(tmp_path / "student.json")
    assert "weights" not in caught.value.fix
    bare = json.loads((tiny_model / "open_clip_config.json").read_text())["model_cfg"]
    (tmp_path / "student.json").write_text(json.dumps(bare))
    assert read_config(tmp_path / "student.json") == (bare, {})
    (tmp_path / "student.json").write_text(json.dumps(bare | {"embed_dim": 0}))
    with pytest.raises(ClipcidError, match=r"Expected `int` >= 1 - at `\$\.model_cfg\.embed_dim`"):
        read_config(tmp_path / "student.json")


def test_a_teacher_needs_weights(tmp_path: Path, tiny_model: Path) -> None:
    assert with_default_tag(parse_model("ViT-L-14")).spec == "ViT-L-14:laion2b_s32b_b82k"
    assert with_default_tag(parse_model("ViT-B-32:openai")).tag == "openai"
    with pytest.raises(ClipcidError, match="without default weights"):
        with_default_tag(parse_model("RN50"))
    config = tmp_path / "small.json"
    config.write_text((tiny_model / "open_clip_config.json").read_text())
    with pytest.raises(ClipcidError, match="without weights"):
        with_default_tag(parse_model(str(config)))


def test_default_tags_exist_and_were_trained_with_the_architectures_activation() -> None:
    import open_clip

    images_and_texts = {name for name in open_clip.list_models() if "vision_cfg" in open_clip.get_model_config(name)}
    assert set(known_architectures()) == images_and_texts
    for architecture, tag in DEFAULT_TAGS.items():
        weights = open_clip.get_pretrained_cfg(architecture, tag)
        assert weights, f"{architecture}:{tag}"
        config = open_clip.get_model_config(architecture)
        assert weights.get("quick_gelu", False) == config.get("quick_gelu", False), f"{architecture}:{tag}"


def test_weights_are_found_as_open_clip_finds_them(tmp_path: Path) -> None:
    from open_clip.factory import _find_checkpoint_in_dir

    assert find_weights(tmp_path) is None
    names = ("zzz.pth", "aaa.bin", "model.safetensors", "open_clip_pytorch_model.bin", "open_clip_model.safetensors")
    for name in names:
        (tmp_path / name).touch()
        assert str(find_weights(tmp_path)) == _find_checkpoint_in_dir(tmp_path)


def use_open_clip(_: int) -> None:
    """Be run in a worker, whose server has imported open_clip and nothing that few models need."""
    from torchvision.ops import roi_align

    from clipcid_cli.runtime.models.guarded_open_clip import import_towers, open_clip

    assert not {"timm", "transformers", "torch._dynamo", "torch._dynamo.utils"} & sys.modules.keys()
    import_towers({"vision_cfg": {}, "text_cfg": {}})
    assert open_clip.timm_model.timm is None
    import_towers({"vision_cfg": {"timm_model_name": "test_vit"}, "text_cfg": {}})
    assert open_clip.timm_model.timm.__name__ == "timm"
    assert open_clip.hf_model.transformers is None
    # What torchvision's operators ask the compiler, once they run on a GPU.
    assert sys.modules["torchvision.ops.roi_align"].is_compile_supported("cpu") is True
    assert roi_align(torch.ones(1, 1, 4, 4), [torch.tensor([[0.0, 0, 2, 2]])], 1).item() == 1


def test_what_open_clip_imports_comes_when_it_is_needed() -> None:
    assert list(ordered_map(use_open_clip, [0], 1)) == [None]
