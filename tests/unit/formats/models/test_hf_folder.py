"""Which open_clip models Hugging Face's CLIPModel can express, what they become, and what the page of an export runs by."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path

import open_clip
import pytest
from conftest import TINY_CONFIG, changed

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.models.hf_clip import ClipArchitecture
from clipcid_cli.formats.models.hf_folder import make_image_processor, validate_for_hf
from clipcid_cli.formats.models.onnx_file import validate_for_classifier
from clipcid_cli.formats.models.web_folder import validate_packages, write_engine

PIXELS = {"size": [32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
ARCHITECTURES = [
    path
    for path in sorted((Path(open_clip.__file__).parent / "model_configs").glob("*.json"))
    if "vision_cfg" in json.loads(path.read_text())
]
EXPRESSIBLE = {
    "ViT-B-16", "ViT-B-16-plus", "ViT-B-16-plus-240", "ViT-B-16-quickgelu", "ViT-B-32", "ViT-B-32-256",
    "ViT-B-32-plus-256", "ViT-B-32-quickgelu", "ViT-H-14", "ViT-H-14-378", "ViT-H-14-378-quickgelu", "ViT-H-14-quickgelu",
    "ViT-H-16", "ViT-L-14", "ViT-L-14-280", "ViT-L-14-336", "ViT-L-14-336-quickgelu", "ViT-L-14-quickgelu", "ViT-L-16",
    "ViT-L-16-320", "ViT-M-16", "ViT-M-32", "ViT-M-32-alt", "ViT-S-16", "ViT-S-16-alt", "ViT-S-32",
    "ViT-S-32-alt", "ViT-bigG-14", "ViT-bigG-14-quickgelu", "ViT-e-14", "ViT-g-14",
    "ViT-H-14-worldwide", "ViT-H-14-worldwide-378", "ViT-H-14-worldwide-quickgelu", "ViT-L-14-worldwide",
    "ViT-L-14-worldwide-quickgelu", "ViT-bigG-14-worldwide", "ViT-bigG-14-worldwide-378",
    "ViT-B-16-SigLIP", "ViT-B-16-SigLIP-256", "ViT-B-16-SigLIP-384", "ViT-B-16-SigLIP-512", "ViT-B-16-SigLIP-i18n-256",
    "ViT-B-16-SigLIP2", "ViT-B-16-SigLIP2-256", "ViT-B-16-SigLIP2-384", "ViT-B-16-SigLIP2-512",
    "ViT-B-32-SigLIP2-256", "ViT-L-16-SigLIP-256", "ViT-L-16-SigLIP-384", "ViT-L-16-SigLIP2-256",
    "ViT-L-16-SigLIP2-384", "ViT-L-16-SigLIP2-512", "ViT-SO400M-14-SigLIP", "ViT-SO400M-14-SigLIP-378",
    "ViT-SO400M-14-SigLIP-384", "ViT-SO400M-14-SigLIP2", "ViT-SO400M-14-SigLIP2-378", "ViT-SO400M-16-SigLIP2-256",
    "ViT-SO400M-16-SigLIP2-384", "ViT-SO400M-16-SigLIP2-512", "ViT-gopt-16-SigLIP2-256", "ViT-gopt-16-SigLIP2-384",
}  # fmt: skip


def test_every_architecture_of_open_clip_is_translated_or_refused_by_name() -> None:
    for path in ARCHITECTURES:
        config = json.loads(path.read_text())
        if path.stem in EXPRESSIBLE:
            validate_for_hf(config, PIXELS, "SimpleTokenizer")
            continue
        with pytest.raises(ClipcidError, match=r"_cfg\.|custom_text") as caught:
            validate_for_hf(config, PIXELS, "SimpleTokenizer")
        assert "--format open-clip" in caught.value.fix
    assert {path.stem for path in ARCHITECTURES} >= EXPRESSIBLE


UNEXPRESSED = {
    "vision_cfg.timm_model_name": ("convnext_base", ""),
    "vision_cfg.layers": ([3, 4, 6, 3], ", a ResNet's"),
    "vision_cfg.image_size": ([32, 64], ", not square"),
    "vision_cfg.patch_size": ([8, 16], ", not square"),
    "vision_cfg.pool_type": ("avg", ""),
    "vision_cfg.ls_init_value": (0, ""),  # 0 is a value, and no way to say `none`: the model may have trained it
    "vision_cfg.act_kwargs": ({"beta": 1}, ""),
    "vision_cfg.norm_kwargs": ({"bias": False}, ""),
    "text_cfg.no_causal_mask": (True, ""),
    "text_cfg.pool_type": ("eos", ""),
    "text_cfg.proj_type": ("none", ""),
    "text_cfg.vocab_size": (1000, ", below the 49408 of CLIP's tokenizer"),
    "text_cfg.some_new_setting": (0, ""),
    "custom_text": (True, ""),
    "init_logit_bias": (False, ""),
}


def test_all_that_cannot_be_expressed_is_named() -> None:
    changes = {name.replace(".", "__"): value for name, (value, _) in UNEXPRESSED.items()}
    config = changed(TINY_CONFIG, multimodal_cfg={"width": 8, "heads": 2}, **changes)
    pixels = {"resize_mode": "longest", "size": [32, 48], "interpolation": "random"}
    with pytest.raises(ClipcidError) as caught:
        validate_for_hf(config, PIXELS | pixels, "HFTokenizer")
    expected = [f"{name} is {value!r}{why};" for name, (value, why) in UNEXPRESSED.items()]
    expected += [f"preprocess_cfg.{name} is {value!r}" for name, value in pixels.items()]
    for said in (*expected, "multimodal_cfg is set;", "its tokenizer is HFTokenizer, not CLIP's;"):
        assert said in caught.value.message
    with pytest.raises(ClipcidError, match=r"classifier\.onnx: .*resize_mode is 'longest'"):
        validate_for_classifier(PIXELS | pixels)


def test_what_siglip_is_not_is_named() -> None:
    config = open_clip.get_model_config("ViT-B-16-SigLIP")
    config["text_cfg"] |= {"no_causal_mask": False, "proj_bias": False, "tokenizer_kwargs": {"strip_sep_token": True}}
    with pytest.raises(ClipcidError, match="Hugging Face's SiglipModel cannot express this model") as caught:
        validate_for_hf(config, PIXELS, "HFTokenizer")
    for name, value in config["text_cfg"].items():
        changed_here = name in ("no_causal_mask", "proj_bias", "tokenizer_kwargs")
        assert (f"text_cfg.{name} is {value!r}" in caught.value.message) == changed_here


def test_settings_are_translated() -> None:
    plain = ClipArchitecture().make_config(TINY_CONFIG, 2.5)
    assert plain.vision_config.hidden_act == plain.text_config.hidden_act == "gelu"
    assert plain.vision_config.num_attention_heads == 2
    assert plain.vision_config.intermediate_size == 128
    assert plain.projection_dim == 32
    assert plain.logit_scale_init_value == 2.5
    assert plain.text_config.max_position_embeddings == 12
    assert plain.text_config.eos_token_id == 49407
    assert (
        ClipArchitecture().make_config(changed(TINY_CONFIG, quick_gelu=True), 2.5).text_config.hidden_act
        == "quick_gelu"
    )
    tanh = ClipArchitecture().make_config(
        changed(TINY_CONFIG, vision_cfg__act_kwargs={"approximate": "tanh"}, text_cfg__norm_kwargs={"eps": 1e-6}), 2.5
    )
    assert tanh.vision_config.hidden_act == "gelu_pytorch_tanh"
    assert (tanh.vision_config.layer_norm_eps, tanh.text_config.layer_norm_eps) == (1e-5, 1e-6)
    validate_for_hf(changed(TINY_CONFIG, text_cfg__pool_type="eos", text_cfg__eos_id=49407), PIXELS, "SimpleTokenizer")
    without = {"init_logit_bias": None, "vision_cfg__ls_init_value": None, "custom_text": False, "multimodal_cfg": {}}
    without["text_cfg__act_kwargs"] = {"approximate": "none"}
    validate_for_hf(changed(TINY_CONFIG, **without), PIXELS, "SimpleTokenizer")

    shortest, squash = (make_image_processor(PIXELS | {"resize_mode": mode}) for mode in ("shortest", "squash"))
    assert (dict(shortest.size), shortest.do_center_crop) == ({"shortest_edge": 32}, True)
    assert (dict(squash.size), squash.do_center_crop) == ({"height": 32, "width": 32}, False)
    bilinear = make_image_processor(PIXELS | {"interpolation": "bilinear"})
    assert (shortest.resample, bilinear.resample) == (3, 2)


def test_without_npm_the_command_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ClipcidError, match="npm pack onnxruntime-web@"):
        validate_packages(None)


def test_npm_does_not_stand_in_the_users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose .npmrc and package.json, perhaps a stranger's, it would obey."""
    (tmp_path / "npm").write_text('#!/bin/sh\nread line < package.json\necho "in $PWD: $line" >&2\nexit 1\n')
    (tmp_path / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(ClipcidError, match=r"in /.*: \{\}") as failed:
        write_engine(tmp_path / "web", None)
    assert str(Path.cwd()) not in failed.value.message


def test_another_file_under_a_packages_name_is_refused(tmp_path: Path) -> None:
    archive = tmp_path / "onnxruntime-web-1.30.0.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        for name in ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"):
            tar.addfile(tarfile.TarInfo(f"package/dist/{name}"))
    with pytest.raises(ClipcidError, match=r"npm's onnxruntime-web@1.30.0: its hash is sha512-.*==, not sha512-q0y"):
        write_engine(tmp_path / "web", tmp_path)
    assert not (tmp_path / "web").exists()
