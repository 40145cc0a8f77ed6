"""How a model of open_clip becomes transformers' CLIP, or MetaCLIP 2: settings, names of tensors, or why it cannot.

CLIP is one architecture: a plain ViT with a class token, and a causal text transformer read at its end token; MetaCLIP 2 is
the same with another tokenizer. Any setting of open_clip that is neither translated here nor known to change nothing in
evaluation is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch

from clipcid_cli.formats.models.open_clip_folder import pixel_problems, square_side

_VOCABULARY_SIZE = 49408
BOS_ID, EOS_ID = 49406, 49407

Expressed = Mapping[str, Callable[[Any], bool]]

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


def _describe(value: Any) -> str:
    return "set" if isinstance(value, dict) and len(value) > 1 else repr(value)


# Which values of a setting CLIP has; of any that is not here only those that say nothing.
CLIP_SETTINGS: Expressed = {
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

# Settings that come with a tokenizer of the model's own.
TOKENIZER_SETTINGS: Expressed = {
    "hf_tokenizer_name": bool,
    "tokenizer_kwargs": lambda options: set(options or {}) <= {"clean"},
    "vocab_size": bool,
}

# From open_clip's names of tensors to Hugging Face's, which spells `pre_layrnorm` so.
CLIP_TENSORS = (
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


class ClipArchitecture:
    """``CLIPModel`` of transformers."""

    name = "CLIP"  # of its classes
    expressed: ClassVar[Expressed] = CLIP_SETTINGS
    renamed: ClassVar[tuple[tuple[str, str], ...]] = CLIP_TENSORS
    # Whether its text tower attends to padding, so that every text must have the model's length.
    sees_padding = False

    def problems(self, model: Mapping[str, Any], preprocess: Mapping[str, Any], tokenizer: str) -> list[str]:
        """Name every setting of a model of open_clip that the architecture and its processor cannot express."""
        towers = {"": model, "vision_cfg.": model["vision_cfg"], "text_cfg.": self._text_settings(model)}
        problems = [
            f"{prefix}{name} is {_describe(value)}{_WHY_NOT.get(name, '')}"
            for prefix, settings in towers.items()
            for name, value in settings.items()
            if not self.expressed.get(name, _is_off)(value)
        ]
        return problems + self._tokenizer_problems(tokenizer) + pixel_problems(preprocess)

    def _text_settings(self, model: Mapping[str, Any]) -> Mapping[str, Any]:
        text: Mapping[str, Any] = model["text_cfg"]
        if text.get("pool_type") == "eos" and text.get("eos_id") == EOS_ID:
            return {**text, "pool_type": "argmax"}  # the same place in CLIP's tokens
        return text

    def _tokenizer_problems(self, tokenizer: str) -> list[str]:
        return [] if tokenizer == "SimpleTokenizer" else [f"its tokenizer is {tokenizer}, not CLIP's"]

    def module_problems(self, module: Any) -> list[str]:
        """Name what of a module, beside its settings, the architecture cannot express."""
        return []

    def make_config(self, model: Mapping[str, Any], logit_scale: float, module: Any = None) -> Any:
        """Translate open_clip's ``model_cfg``, with its defaults; the scale is the learned logarithm."""
        import transformers

        projection = {"projection_dim": int(model["embed_dim"])}
        return getattr(transformers, f"{self.name}Config")(
            **projection,
            logit_scale_init_value=logit_scale,
            vision_config=_vision_config(model) | projection,
            text_config=text_config(model) | self._special_tokens(model["text_cfg"]) | projection,
        )

    def _special_tokens(self, text: Mapping[str, Any]) -> dict[str, int | None]:
        # transformers takes the first token of this number, open_clip the first of the largest: the same one.
        return {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": EOS_ID}

    def rename(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the tensors of a model of open_clip under transformers' names.

        open_clip stores queries, keys and values in one matrix, and projections as [width, D], multiplied from the right.
        """
        renamed = dict[str, torch.Tensor]()
        for name, tensor in tensors.items():
            for pattern, replacement in self.renamed:
                name = re.sub(pattern, replacement, name)
            if ".self_attn.in_proj_" in name:
                parts = zip("qkv", tensor.chunk(3), strict=True)
                renamed |= {name.replace(".in_proj_", f".{letter}_proj."): part.clone() for letter, part in parts}
            elif name.endswith("_projection.weight"):
                renamed[name] = tensor.T.contiguous()
            else:
                renamed[name] = tensor.reshape(()) if name == "logit_scale" else tensor
        return renamed


class MetaClip2Architecture(ClipArchitecture):
    """``MetaClip2Model`` of transformers: a CLIP with a tokenizer of its own, and that one's end token."""

    name = "MetaClip2"
    expressed: ClassVar[Expressed] = {
        **CLIP_SETTINGS,
        **TOKENIZER_SETTINGS,
        "pool_type": lambda pooling: pooling in ("tok", "eos"),
    }

    def _text_settings(self, model: Mapping[str, Any]) -> Mapping[str, Any]:
        return model["text_cfg"]  # type: ignore[no-any-return]

    def _tokenizer_problems(self, tokenizer: str) -> list[str]:
        return []

    def _special_tokens(self, text: Mapping[str, Any]) -> dict[str, int | None]:
        # 2 is open_clip's own default. No other token has a part in the computation.
        return {"bos_token_id": None, "eos_token_id": int(text.get("eos_id", 2)), "pad_token_id": None}


def _vision_config(model: Mapping[str, Any]) -> dict[str, Any]:
    vision = {"width": 768, "head_width": 64} | model["vision_cfg"]
    return {
        "image_size": square_side(vision.get("image_size") or 224),
        "patch_size": square_side(vision.get("patch_size") or 16),
        "num_attention_heads": int(vision["width"]) // int(vision["head_width"]),
        **_transformer(vision, bool(model.get("quick_gelu"))),
    }


def text_config(model: Mapping[str, Any]) -> dict[str, Any]:
    """Translate a text tower, but its special tokens."""
    text = {"width": 512, "heads": 8} | model["text_cfg"]
    return {
        "vocab_size": int(text.get("vocab_size", _VOCABULARY_SIZE)),
        "max_position_embeddings": int(text.get("context_length", 77)),
        "num_attention_heads": int(text["heads"]),
        **_transformer(text, bool(model.get("quick_gelu"))),
    }


def _transformer(tower: Mapping[str, Any], quick_gelu: bool) -> dict[str, Any]:
    tanh = (tower.get("act_kwargs") or {}).get("approximate") == "tanh"
    return {
        "hidden_size": int(tower["width"]),
        "intermediate_size": int(tower["width"] * float(tower.get("mlp_ratio", 4.0))),
        "num_hidden_layers": int(tower.get("layers", 12)),
        "hidden_act": "quick_gelu" if quick_gelu else "gelu_pytorch_tanh" if tanh else "gelu",
        "layer_norm_eps": float((tower.get("norm_kwargs") or {}).get("eps", 1e-5)),
    }
