"""The configuration of an open_clip model as Hugging Face's ``CLIPModel``, or why there is none.

``CLIPModel`` is one architecture: a plain ViT with a class token, and a causal text transformer read at its end token. A
setting of open_clip is either translated here or known to change nothing in evaluation; any other is refused by name, and
none is dropped silently.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from clipcid_cli.errors import ClipcidError

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
BOS_ID, EOS_ID = 49406, 49407
_VOCABULARY = 49408

# PIL's numbers of the filters, as Hugging Face stores them.
_RESAMPLE = {"bilinear": 2, "bicubic": 3}

# Settings that are translated below, and those that have no effect on a model that only encodes.
_MODEL_FIELDS = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu"} | {"init_logit_scale", "nonscalar_logit_scale"}
_TOWER_FIELDS = {"width", "layers", "mlp_ratio", "act_kwargs", "norm_kwargs"} | {"final_ln_after_pool"}
_TIMM_FIELDS = {f"timm_{name}" for name in ("model_pretrained", "pool", "proj", "proj_bias", "drop", "drop_path")}
_VISION_FIELDS = _TOWER_FIELDS | _TIMM_FIELDS | {
    "image_size", "patch_size", "head_width",
    "patch_dropout", "pos_embed_type", "attn_pooler_queries", "attn_pooler_heads",
}  # fmt: skip
_TEXT_FIELDS = _TOWER_FIELDS | {
    "context_length", "vocab_size", "heads",
    "eos_id", "pad_id", "hf_model_pretrained", "hf_proj_type", "hf_pooler_type",
}  # fmt: skip

# Values under which an unknown setting is off.
_OFF: tuple[Any, ...] = (None, False, "", {})
# Known, and refused unless they have a value under which they do nothing.
_INERT: dict[str, tuple[Any, ...]] = {
    "init_logit_bias": (None,),
    "ls_init_value": (None,),
    "pool_type": ("tok", "argmax"),
    "proj_type": ("linear",),
    "block_type": (None, "default"),
}


@dataclasses.dataclass(frozen=True)
class HfDescription:
    """Content of the files of a ``CLIPModel`` folder, without weights and vocabulary.

    Attributes:
        config: ``config.json``, without the number format of the weights.
        preprocessor: ``preprocessor_config.json``.
        tokenizer: ``tokenizer_config.json``.
    """

    config: dict[str, Any]
    preprocessor: dict[str, Any]
    tokenizer: dict[str, Any]


def describe_as_hf(
    model: Mapping[str, Any], preprocess: Mapping[str, Any], tokenizer: str, logit_scale: float
) -> HfDescription:
    """Translate an open_clip model.

    Args:
        model: The ``model_cfg`` of open_clip.
        preprocess: Its ``preprocess_cfg``, complete.
        logit_scale: The learned parameter: the logarithm of the factor on cosines.

    Raises:
        ClipcidError: naming every setting that ``CLIPModel`` cannot express.
    """
    vision, text = model["vision_cfg"], model["text_cfg"]
    problems = [
        *_unknown("", model, _MODEL_FIELDS),
        *_unknown("vision_cfg.", vision, _VISION_FIELDS),
        *_unknown("text_cfg.", text, _TEXT_FIELDS),
        *_vision_problems(vision),
        *_text_problems(text, tokenizer),
        *_pixel_problems(preprocess),
    ]
    if problems:
        raise ClipcidError(
            "--format hf: Hugging Face's CLIPModel cannot express this model: " + "; ".join(problems) + ".",
            "Export it with --format open-clip or onnx.",
        )
    quick = bool(model.get("quick_gelu"))
    width = int(model["embed_dim"])
    length = int(text.get("context_length", 77))
    return HfDescription(
        config={
            "architectures": ["CLIPModel"],
            "model_type": "clip",
            "projection_dim": width,
            "logit_scale_init_value": logit_scale,
            "initializer_factor": 1.0,
            "vision_config": {
                "model_type": "clip_vision_model",
                "image_size": _side(vision.get("image_size", 224)),
                "patch_size": _side(vision.get("patch_size", 16)),
                "num_channels": 3,
                "num_attention_heads": int(vision.get("width", 768)) // int(vision.get("head_width", 64)),
                **_transformer(vision, 768, 12, quick, width),
            },
            "text_config": {
                "model_type": "clip_text_model",
                "vocab_size": int(text.get("vocab_size", _VOCABULARY)),
                "max_position_embeddings": length,
                "num_attention_heads": int(text.get("heads", 8)),
                # transformers takes the first token of this number, open_clip the first of the largest: the same one.
                "bos_token_id": BOS_ID,
                "eos_token_id": EOS_ID,
                "pad_token_id": EOS_ID,
                **_transformer(text, 512, 12, quick, width),
            },
        },
        preprocessor=_preprocessor(preprocess),
        tokenizer={
            "tokenizer_class": "CLIPTokenizer",
            "processor_class": "CLIPProcessor",
            "model_max_length": length,
            "bos_token": BOS,
            "eos_token": EOS,
            "unk_token": EOS,
            "pad_token": EOS,
            "do_lower_case": True,
            "add_prefix_space": False,
            "errors": "replace",
            "clean_up_tokenization_spaces": True,
        },
    )


def _transformer(
    tower: Mapping[str, Any], width: int, layers: int, quick_gelu: bool, projection: int
) -> dict[str, Any]:
    """Translate the settings that both towers have; `width` and `layers` are open_clip's defaults."""
    width = int(tower.get("width", width))
    tanh = (tower.get("act_kwargs") or {}).get("approximate") == "tanh"
    return {
        "hidden_size": width,
        "intermediate_size": int(width * float(tower.get("mlp_ratio", 4.0))),
        "num_hidden_layers": int(tower.get("layers", layers)),
        "projection_dim": projection,
        "hidden_act": "quick_gelu" if quick_gelu else "gelu_pytorch_tanh" if tanh else "gelu",
        "layer_norm_eps": float((tower.get("norm_kwargs") or {}).get("eps", 1e-5)),
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "initializer_factor": 1.0,
    }


def _preprocessor(preprocess: Mapping[str, Any]) -> dict[str, Any]:
    side = _side(preprocess["size"])
    square = {"height": side, "width": side}
    squash = preprocess["resize_mode"] == "squash"
    return {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "CLIPProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": square if squash else {"shortest_edge": side},
        "resample": _RESAMPLE[preprocess["interpolation"]],
        "do_center_crop": not squash,
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess["mean"]),
        "image_std": list(preprocess["std"]),
    }


def _unknown(prefix: str, settings: Mapping[str, Any], known: set[str]) -> list[str]:
    """Name the settings that are not translated, except those that are off or have a value under which they do nothing."""
    return [
        f"{prefix}{name} is {'set' if isinstance(value, dict) and len(value) > 1 else repr(value)}"
        for name, value in settings.items()
        if name not in known
        # By type, too: 0 equals False in Python, but is a value that is set.
        and not any(type(value) is type(off) and value == off for off in _INERT.get(name, _OFF))
        # open_clip reads the end token from `eos_id` under this pooling.
        and not (prefix == "text_cfg." and name == "pool_type" and value == "eos" and settings.get("eos_id") == EOS_ID)
    ]


def _vision_problems(vision: Mapping[str, Any]) -> list[str]:
    problems = []
    if isinstance(vision.get("layers"), list | tuple):
        problems.append(f"vision_cfg.layers is {list(vision['layers'])}, a ResNet's")
    problems += [
        f"vision_cfg.{name} is {vision[name]!r}, not square"
        for name in ("image_size", "patch_size")
        if vision.get(name) is not None and _side(vision[name]) is None
    ]
    return problems + _tower_problems("vision_cfg", vision)


def _text_problems(text: Mapping[str, Any], tokenizer: str) -> list[str]:
    problems = _tower_problems("text_cfg", text)
    if tokenizer != "SimpleTokenizer":
        problems.append(f"its tokenizer is {tokenizer}, not CLIP's")
    if int(text.get("vocab_size", _VOCABULARY)) < _VOCABULARY:
        problems.append(f"text_cfg.vocab_size is {text['vocab_size']}, below the {_VOCABULARY} of CLIP's tokenizer")
    return problems


def _tower_problems(name: str, tower: Mapping[str, Any]) -> list[str]:
    problems = []
    activation, norm = tower.get("act_kwargs") or {}, tower.get("norm_kwargs") or {}
    if activation not in ({}, {"approximate": "none"}, {"approximate": "tanh"}):
        problems.append(f"{name}.act_kwargs is {activation}")
    if set(norm) - {"eps"}:
        problems.append(f"{name}.norm_kwargs is {norm}")
    return problems


def _pixel_problems(preprocess: Mapping[str, Any]) -> list[str]:
    problems = []
    if _side(preprocess["size"]) is None:
        problems.append(f"preprocess_cfg.size is {preprocess['size']}, not square")
    if preprocess["resize_mode"] not in ("shortest", "squash"):
        problems.append(f"preprocess_cfg.resize_mode is {preprocess['resize_mode']!r}")
    if preprocess["interpolation"] not in _RESAMPLE:
        problems.append(f"preprocess_cfg.interpolation is {preprocess['interpolation']!r}")
    return problems


def _side(size: Any) -> int | None:
    """Return the side of a square given as one number or two; None when it is not square."""
    if isinstance(size, list | tuple):
        return int(size[0]) if len(set(size)) == 1 else None
    return int(size)
