"""A student's image tower beside its teacher's text tower, of every kind, as one model that open_clip loads alone."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import msgspec
import open_clip
import pytest
import torch
from conftest import TINY_CONFIG, changed, write_tiny_model
from families import FAMILIES, write_family
from safetensors.torch import load_file

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.models.open_clip_folder import write_model_folder
from clipcid_cli.runtime.models.clip_model import ClipModel
from clipcid_cli.runtime.models.load import load_model
from clipcid_cli.runtime.models.names import parse_model
from clipcid_cli.runtime.models.text_tower import put_beside
from clipcid_cli.runtime.precision import Precision

CPU = torch.device("cpu")
FP32 = Precision("fp32", "a test")
SLOW = pytest.mark.slow
TEXTS = ["a red drawing", "two pale squares"]


def save(model: ClipModel, folder: Path, source: Path) -> Path:
    info = model.info
    tensors, tokenizer = model.module.state_dict(), model.tokenizer.whole
    write_model_folder(folder, info.config, info.preprocess, tensors, source=source, tokenizer=tokenizer)
    return folder


def write_image_tower(folder: Path, family: str) -> Path:
    """Write a student of another width: a ViT, or SigLIP's tower, which has no layer of its own for the embedding."""
    if family == "SigLIP":
        siglip = FAMILIES[family]
        assert siglip.trunk is not None
        wide = {"smaller": siglip.smaller | {"embed_dim": 48}, "trunk": siglip.trunk | {"embed_dim": 48}}
        return write_family(folder, dataclasses.replace(siglip, **wide))
    folder.mkdir()
    (folder / "student.json").write_text(json.dumps(changed(TINY_CONFIG, embed_dim=8)))
    return folder / "student.json"


@pytest.mark.parametrize("family", [pytest.param("ViT", marks=SLOW), "SigLIP", pytest.param("XLM-R", marks=SLOW)])
def test_open_clip_loads_both_towers(family: str, tmp_path: Path) -> None:
    """CLIP's text tower, a custom one with a tokenizer of its own, and one of transformers."""
    source = write_family(tmp_path / "family", FAMILIES[family])
    teacher = load_model(parse_model(str(source)), fresh_seed=1)
    texts = teacher.encode_texts(teacher.tokenizer(TEXTS), FP32)
    folder = tmp_path / "student"  # a tower of timm that is in a folder must be in the model's
    model, random = put_beside(parse_model(str(write_image_tower(folder, family))), teacher, CPU, fresh_seed=0)
    assert random == []
    pixels = torch.randint(256, (2, 32, 32, 3), dtype=torch.uint8)
    images = model.encode_images(pixels, FP32)
    assert images.shape == texts.shape
    saved = save(model, folder, source)
    loaded = load_model(parse_model(str(saved)))
    assert loaded.info.parameters == model.info.parameters
    assert torch.equal(loaded.encode_images(pixels, FP32), images)
    assert torch.equal(loaded.encode_texts(loaded.tokenizer(TEXTS), FP32), texts)
    assert loaded.logit_scale == teacher.logit_scale
    if family == "ViT":
        alone = open_clip.create_model(f"local-dir:{saved}").eval()
        with torch.no_grad():
            made = alone.encode_text(open_clip.get_tokenizer(f"local-dir:{saved}")(TEXTS), normalize=True)
        assert torch.allclose(made, texts, atol=1e-6)


def test_weights_that_were_trained_are_taken_where_they_fit(tiny_model: Path, tmp_path: Path) -> None:
    wide = write_tiny_model(tmp_path / "wide", changed(TINY_CONFIG, embed_dim=40, vision_cfg__width=48))
    teacher = load_model(parse_model(str(tiny_model)))
    for change, message in (
        ({"quick_gelu": True}, "was trained with GELU, the text tower of .* with QuickGELU"),
        ({"multimodal_cfg": {}}, "a part of CoCa"),
    ):
        info = msgspec.structs.replace(teacher.info, config=teacher.info.config | change)
        with pytest.raises(ClipcidError, match=message):
            put_beside(parse_model(str(wide)), dataclasses.replace(teacher, info=info), CPU, fresh_seed=0)
    model, random = put_beside(parse_model(str(wide)), teacher, CPU, fresh_seed=0)
    assert random == ["proj"], "another width of embeddings"
    trained = load_file(wide / "open_clip_model.safetensors")
    made = model.module.state_dict()
    names = [name for name in made if name.startswith("visual.") and name != "visual.proj"]
    assert len(names) > 20
    assert all(torch.equal(made[name], trained[name]) for name in names)
