"""An open_clip model as a folder that ``CLIPModel`` and ``CLIPProcessor`` of transformers read, or why there is none.

``CLIPModel`` is one architecture: a plain ViT with a class token, and a causal text transformer read at its end token. Any
setting of open_clip that is neither translated here nor known to change nothing in evaluation is refused by name. Also
``tokenizer.json``, which the ONNX form has too.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.files import write_bytes, write_json, write_text
from clipcid_cli.formats.models.export_folder import (
    HF_CONFIG,
    HF_WEIGHTS,
    MERGES,
    SPECIAL_TOKENS,
    TOKENIZER,
    VOCABULARY,
)
from clipcid_cli.formats.models.open_clip_folder import RESAMPLE, pixel_problems, refusals_of_the_system, square_side

_VOCABULARY_SIZE = 49408
BOS_ID, EOS_ID = 49406, 49407

# Settings that are translated, or have no effect on a model that only encodes.
_KNOWN = (
    "embed_dim vision_cfg text_cfg quick_gelu init_logit_scale nonscalar_logit_scale width mlp_ratio head_width heads "
    "context_length patch_dropout pos_embed_type attn_pooler_queries attn_pooler_heads eos_id pad_id final_ln_after_pool "
    "timm_model_pretrained timm_pool timm_proj timm_proj_bias timm_drop timm_drop_path "
    "hf_model_pretrained hf_proj_type hf_pooler_type"
)


def _is_off(value: Any) -> bool:
    """Tell whether a setting says nothing; 0, which equals False in Python, says something."""
    return value is None or value is False or value in ("", {})


# Which values of a setting are expressed; of any that is not here only those that say nothing.
_EXPRESSED: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(_KNOWN.split(), lambda value: True),
    "init_logit_bias": lambda bias: bias is None,
    "ls_init_value": lambda scale: scale is None,
    "pool_type": lambda pooling: pooling in ("tok", "argmax"),
    "proj_type": lambda projection: projection == "linear",
    "block_type": lambda block: block in (None, "default"),
    "layers": lambda layers: not isinstance(layers, list | tuple),
    **dict.fromkeys(("image_size", "patch_size"), lambda size: size is None or square_side(size) is not None),
    "act_kwargs": lambda options: (options or {}) in ({}, {"approximate": "none"}, {"approximate": "tanh"}),
    "norm_kwargs": lambda options: set(options or {}) <= {"eps"},
    "vocab_size": lambda size: size >= _VOCABULARY_SIZE,
}
_WHY_NOT = {
    "layers": ", a ResNet's",
    "image_size": ", not square",
    "patch_size": ", not square",
    "vocab_size": f", below the {_VOCABULARY_SIZE} of CLIP's tokenizer",
}

# From open_clip's names of tensors to Hugging Face's, which spells `pre_layrnorm` so.
_RENAMED = (
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.attn\.", ".self_attn."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^text_projection$", "text_projection.weight"),
)


def hf_problems(model: Mapping[str, Any], preprocess: Mapping[str, Any], tokenizer: str) -> list[str]:
    """Name every setting of a model of open_clip that ``CLIPModel`` and ``CLIPProcessor`` cannot express."""
    text = model["text_cfg"]
    if text.get("pool_type") == "eos" and text.get("eos_id") == EOS_ID:
        text = text | {"pool_type": "argmax"}  # the same place in CLIP's tokens
    towers = {"": model, "vision_cfg.": model["vision_cfg"], "text_cfg.": text}
    problems = [
        f"{prefix}{name} is {'set' if isinstance(value, dict) and len(value) > 1 else repr(value)}{_WHY_NOT.get(name, '')}"
        for prefix, settings in towers.items()
        for name, value in settings.items()
        if not _EXPRESSED.get(name, _is_off)(value)
    ]
    if tokenizer != "SimpleTokenizer":
        problems.append(f"its tokenizer is {tokenizer}, not CLIP's")
    return problems + pixel_problems(preprocess)


def validate_for_hf(model: Mapping[str, Any], preprocess: Mapping[str, Any], tokenizer: str) -> None:
    """Refuse a model of open_clip that ``CLIPModel`` cannot express."""
    if problems := hf_problems(model, preprocess, tokenizer):
        raise ClipcidError(
            "--format hf: Hugging Face's CLIPModel cannot express this model: " + "; ".join(problems) + ".",
            "Export it with --format open-clip or onnx.",
        )


def write_hf_folder(
    folder: Path,
    model: Mapping[str, Any],
    preprocess: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    tokenizer: Any,
) -> None:
    """Write the folder of a model that `validate_for_hf` accepted; its tokenizer is open_clip's ``SimpleTokenizer``."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    config = write_hf_settings(folder, model, preprocess, float(tensors["logit_scale"]), tokenizer)
    with torch.device("meta"):
        empty = transformers.CLIPModel(config)
    empty.load_state_dict(dict(_rename_tensors(tensors)), assign=True)
    with refusals_of_the_system(folder):
        empty.save_pretrained(folder, max_shard_size="1TB")  # in one file
    # safetensors lets the owner alone read it.
    (folder / HF_WEIGHTS).chmod((folder / HF_CONFIG).stat().st_mode)


def write_hf_settings(
    folder: Path, model: Mapping[str, Any], preprocess: Mapping[str, Any], logit_scale: float, tokenizer: Any
) -> Any:
    """Write all of `write_hf_folder` but the weights; return the ``CLIPConfig``. The scale is the learned logarithm."""
    config = make_config(model, logit_scale)
    written_tokenizer = write_clip_tokenizer(folder, tokenizer)
    with refusals_of_the_system(folder):
        config.save_pretrained(folder)
        make_image_processor(preprocess).save_pretrained(folder)
        written_tokenizer.save_pretrained(folder)
    # transformers 5 leaves this file out, and other programs read it.
    write_json(folder / SPECIAL_TOKENS, written_tokenizer.special_tokens_map)
    return config


def make_config(model: Mapping[str, Any], logit_scale: float) -> Any:
    """Translate open_clip's ``model_cfg``, with its defaults, to a ``CLIPConfig``; the scale is the learned logarithm."""
    import transformers

    vision = {"width": 768, "head_width": 64} | model["vision_cfg"]
    text = {"width": 512, "heads": 8} | model["text_cfg"]
    projection = {"projection_dim": int(model["embed_dim"])}
    quick = bool(model.get("quick_gelu"))
    return transformers.CLIPConfig(
        **projection,
        logit_scale_init_value=logit_scale,
        vision_config={
            "image_size": square_side(vision.get("image_size") or 224),
            "patch_size": square_side(vision.get("patch_size") or 16),
            "num_attention_heads": int(vision["width"]) // int(vision["head_width"]),
            **_transformer(vision, quick),
            **projection,
        },
        text_config={
            "vocab_size": int(text.get("vocab_size", _VOCABULARY_SIZE)),
            "max_position_embeddings": int(text.get("context_length", 77)),
            "num_attention_heads": int(text["heads"]),
            # transformers takes the first token of this number, open_clip the first of the largest: the same one.
            "bos_token_id": BOS_ID,
            "eos_token_id": EOS_ID,
            "pad_token_id": EOS_ID,
            **_transformer(text, quick),
            **projection,
        },
    )


def _transformer(tower: Mapping[str, Any], quick_gelu: bool) -> dict[str, Any]:
    tanh = (tower.get("act_kwargs") or {}).get("approximate") == "tanh"
    return {
        "hidden_size": int(tower["width"]),
        "intermediate_size": int(tower["width"] * float(tower.get("mlp_ratio", 4.0))),
        "num_hidden_layers": int(tower.get("layers", 12)),
        "hidden_act": "quick_gelu" if quick_gelu else "gelu_pytorch_tanh" if tanh else "gelu",
        "layer_norm_eps": float((tower.get("norm_kwargs") or {}).get("eps", 1e-5)),
    }


def make_image_processor(preprocess: Mapping[str, Any]) -> Any:
    """Translate open_clip's ``preprocess_cfg`` to a ``CLIPImageProcessor``."""
    import transformers

    side = square_side(preprocess["size"])
    square = {"height": side, "width": side}
    squash = preprocess["resize_mode"] == "squash"
    return transformers.CLIPImageProcessor(
        size=square if squash else {"shortest_edge": side},
        resample=RESAMPLE[preprocess["interpolation"]],
        do_center_crop=not squash,
        crop_size=square,
        image_mean=list(preprocess["mean"]),
        image_std=list(preprocess["std"]),
    )


def _rename_tensors(tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of an open_clip CLIP under Hugging Face's names.

    open_clip stores queries, keys and values in one matrix, and projections as [width, D], multiplied from the right.
    """
    for name, tensor in tensors.items():
        for pattern, replacement in _RENAMED:
            name = re.sub(pattern, replacement, name)
        if ".in_proj_" in name:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                yield name.replace(".in_proj_", f".{letter}_proj."), part.clone()
        elif name.endswith("_projection.weight"):
            yield name, tensor.T.contiguous()
        else:
            yield name, tensor.reshape(()) if name == "logit_scale" else tensor


def write_clip_tokenizer(folder: Path, tokenizer: Any) -> Any:
    """Write the vocabulary and merges of open_clip's ``SimpleTokenizer``; return transformers' tokenizer of them."""
    import transformers

    # Its own special tokens are called otherwise, and are the last two.
    words = {text: token for text, token in tokenizer.encoder.items() if token < BOS_ID}
    words |= {"<|startoftext|>": BOS_ID, "<|endoftext|>": EOS_ID}
    write_text(folder / VOCABULARY, json.dumps(words, ensure_ascii=False) + "\n")
    merges = "".join(f"{left} {right}\n" for left, right in tokenizer.bpe_ranks)
    write_text(folder / MERGES, "#version: 0.2\n" + merges)
    length = int(tokenizer.context_length)
    fast = transformers.CLIPTokenizerFast.from_pretrained(folder, model_max_length=length)
    _fix_length(fast.backend_tokenizer, length, 0, fast.pad_token)
    return fast


def fits_tokenizer_file(tokenizer: Any) -> bool:
    """Tell whether `tokenizer.json` can express an open_clip tokenizer, which replaces some tokens of Hugging Face's."""
    if not hasattr(tokenizer, "tokenizer"):
        return True
    return tokenizer.tokenizer.is_fast and not (tokenizer.tokenizer_mode or tokenizer.strip_sep_token)


def write_tokenizer_file(folder: Path, tokenizer: Any) -> None:
    """Write `tokenizer.json` of an open_clip tokenizer that it can express, for the library tokenizers alone.

    It pads and cuts texts to the model's length, as open_clip does. It does not clean them first, as open_clip does (curly
    quotes, HTML entities, broken encodings).
    """
    if not hasattr(tokenizer, "tokenizer"):
        with TemporaryDirectory() as scratch:
            fast = write_clip_tokenizer(Path(scratch), tokenizer).backend_tokenizer
    else:
        own = tokenizer.tokenizer
        fast = copy.deepcopy(own.backend_tokenizer)
        _fix_length(fast, int(tokenizer.context_length), own.pad_token_id, own.pad_token)
    write_bytes(folder / TOKENIZER, fast.to_str().encode())


def _fix_length(fast: Any, length: int, pad_id: int, pad_token: str) -> None:
    fast.enable_truncation(length)
    fast.enable_padding(length=length, pad_id=pad_id, pad_token=pad_token)
