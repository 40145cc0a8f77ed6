"""Loading open_clip models and what they compute."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_CONFIG, write_tiny_model
from PIL import Image

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.models.open_clip_folder import write_model_folder
from clipcid_cli.records import hash_preprocess
from clipcid_cli.runtime.models.load import load_model
from clipcid_cli.runtime.models.names import ModelName, parse_model
from clipcid_cli.runtime.models.renderer import Renderer
from clipcid_cli.runtime.precision import choose_precision

CPU = torch.device("cpu")
FP32 = choose_precision("fp32", CPU, "embed", 0)
TEXTS = ["a red square", "two green circles, striped"]


def random_images() -> list[Image.Image]:
    random = np.random.default_rng(0)
    sizes = [(40, 70), (64, 32), (32, 32)]
    return [Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


def test_rows_and_pixels_are_open_clips_own(tiny_model: Path) -> None:
    import open_clip

    model = load_model(parse_model(str(tiny_model)))
    theirs, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tiny_model}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tiny_model}")
    render = pickle.loads(pickle.dumps(Renderer(model.info.preprocess)))
    pixels = torch.from_numpy(np.stack([render(image) for image in random_images()]))
    expected_pixels = torch.stack([preprocess(image) for image in random_images()])
    assert torch.equal(model.normalize(pixels), expected_pixels)
    with torch.no_grad():
        expected = theirs.eval().encode_image(expected_pixels, normalize=True)
        expected_texts = theirs.encode_text(tokenizer(TEXTS), normalize=True)
    # Up to rounding: tokens behind a text's end and rows that do not become the feature are left out.
    torch.testing.assert_close(model.encode_images(pixels, FP32), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(model.encode_texts(model.tokenizer(TEXTS), FP32), expected_texts, rtol=0, atol=1e-6)
    assert (model.info.context_length, model.info.image_size) == (12, (32, 32))


def test_fresh_weights_depend_on_the_seed_alone(tmp_path: Path, tiny_model: Path) -> None:
    config = tmp_path / "small.json"
    config.write_text((tiny_model / "open_clip_config.json").read_text())
    name = parse_model(str(config))
    before = torch.random.get_rng_state()
    models = [load_model(name, fresh_seed=1)]
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(1)
    models += [load_model(name, fresh_seed=seed) for seed in (1, 2)]
    weights = [model.module.state_dict()["visual.conv1.weight"] for model in models]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert models[0].info.weights_hash == "fresh:1"
    with pytest.raises(ClipcidError, match="has no weights"):
        load_model(name)


def test_a_fresh_coca_has_no_weight_that_was_left_in_memory(tmp_path: Path) -> None:
    tower = {"width": 32, "layers": 1, "heads": 2}
    vision = {"width": 32, "layers": 1, "head_width": 16, "patch_size": 16, "image_size": 32}
    vision |= {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
    text = tower | {"embed_cls": True, "output_tokens": True}
    config = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text, "multimodal_cfg": tower, "custom_text": True}
    (tmp_path / "coca.json").write_text(json.dumps(config))
    torch.use_deterministic_algorithms(True)  # new memory holds NaN
    try:
        load_model(parse_model(str(tmp_path / "coca.json")), fresh_seed=1)
    finally:
        torch.use_deterministic_algorithms(False)


def test_hashes_tell_weights_and_pixels_apart(tiny_model: Path, tmp_path: Path) -> None:
    model = load_model(parse_model(str(tiny_model)))
    moved = shutil.copytree(tiny_model, tmp_path / "moved")
    assert load_model(parse_model(str(moved))).info.weights_hash == model.info.weights_hash
    state = model.module.state_dict()
    state["logit_scale"] = state["logit_scale"] + 1
    write_model_folder(tmp_path / "other", model.info.config, model.info.preprocess, state)
    other = load_model(parse_model(str(tmp_path / "other")))
    assert other.info.weights_hash != model.info.weights_hash
    assert other.logit_scale == pytest.approx(model.logit_scale * np.e, rel=1e-5)
    preprocess = model.info.preprocess
    base = hash_preprocess(preprocess, fast_decode=False)
    assert hash_preprocess(dict(reversed(preprocess.items())), fast_decode=False) == base
    assert hash_preprocess(preprocess, fast_decode=True) != base
    for key, value in {"mean": [0.4] * 3, "interpolation": "bilinear", "resize_mode": "squash", "size": 48}.items():
        assert hash_preprocess(preprocess | {key: value}, fast_decode=False) != base


def test_weights_are_never_unpickled_and_a_tag_that_there_is_not_is_named(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_model / "open_clip_config.json", tmp_path)
    torch.save({"state_dict": {"a": Path("x"), "b": torch.zeros(2**22)}}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ClipcidError, match=f"{tmp_path}.* could not be loaded") as raised:
        load_model(parse_model(str(tmp_path)))
    assert "copy or download them again" in raised.value.fix
    with pytest.raises(ClipcidError, match="no weights nonsense"):
        load_model(parse_model("ViT-B-32:nonsense"))


@pytest.mark.parametrize(
    ("tower", "entries", "message"),
    [
        ("text_cfg", {"vocab_size": 100}, "cannot encode a text of 12 tokens"),
        ("vision_cfg", {"image_size": 4}, "cannot encode an image of 4 × 4 pixels"),
        (
            "text_cfg",
            {"width": 48, "proj_type": "none"},
            "image tower makes rows of 32 values, its text tower of 48; embed_dim is 32",
        ),
    ],
    ids=["vocabulary", "image", "widths"],
)
def test_towers_that_do_not_fit_are_named_when_loaded(
    tmp_path: Path, tower: str, entries: dict[str, object], message: str
) -> None:
    folder = write_tiny_model(tmp_path / "unfit", {**TINY_CONFIG, tower: {**TINY_CONFIG[tower], **entries}})
    with pytest.raises(ClipcidError, match=message) as raised:
        load_model(parse_model(str(folder)))
    assert "embed_dim in open_clip_config.json" in raised.value.fix


@pytest.mark.parametrize("quick", [True, False])
def test_activation_and_pixels_follow_the_tag(
    quick: bool, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import open_clip
    import open_clip.factory
    import open_clip.pretrained
    from open_clip.transformer import QuickGELU

    config = json.loads((tiny_model / "open_clip_config.json").read_text())["model_cfg"]
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", {"tiny-arch": config | {"quick_gelu": not quick}})
    tag = {"file": str(tiny_model / "open_clip_model.safetensors"), "quick_gelu": quick, "mean": (0.1, 0.2, 0.3)}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-arch", {"some": tag})
    model = load_model(ModelName("tiny-arch:some", "tag", architecture="tiny-arch", tag="some"))
    activations = [module for module in model.module.modules() if isinstance(module, QuickGELU)]
    assert len(activations) == (4 if quick else 0)
    assert model.info.config["quick_gelu"] is quick
    assert model.info.preprocess["mean"] == [0.1, 0.2, 0.3]
    assert model.info.tag == "some"
    # A student folder made of it keeps the activation.
    write_model_folder(tmp_path / "copy", model.info.config, model.info.preprocess, model.module.state_dict())
    copy = load_model(parse_model(str(tmp_path / "copy")))
    tokens = model.tokenizer(TEXTS)
    assert torch.equal(copy.encode_texts(tokens, FP32), model.encode_texts(tokens, FP32))


def test_a_repository_in_the_local_cache_loads_offline(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants as hub

    repository = tmp_path / "models--org--tiny"
    shutil.copytree(tiny_model, repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "ENDPOINT", "https://127.0.0.1:9")
    cached, local = load_model(parse_model("hf-hub:org/tiny")), load_model(parse_model(str(tiny_model)))
    assert cached.info.weights_hash == local.info.weights_hash
    tokens = local.tokenizer(TEXTS)
    assert torch.equal(cached.encode_texts(tokens, FP32), local.encode_texts(tokens, FP32))
