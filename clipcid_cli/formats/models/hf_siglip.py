"""How a SigLIP of open_clip becomes transformers' SigLIP, which SigLIP 2 of one image size is, too.

Its image tower is a ViT of timm that pools its patches by attention; its text tower sees all tokens and is read at the last
one, padding or not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from clipcid_cli.formats.models.hf_clip import (
    CLIP_SETTINGS,
    CLIP_TENSORS,
    TOKENIZER_SETTINGS,
    ClipArchitecture,
    Expressed,
    text_config,
)

# What the text tower is where the settings do not say it, and what SigLIP's is not.
_UNSAID = {"no_causal_mask": False, "proj_bias": False, "pool_type": "argmax"}

# None has a part in the computation.
_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")

# transformers' names of activations, by timm's and PyTorch's own.
_ACTIVATIONS = {"GELU()": "gelu", "GELU(approximate='none')": "gelu", "GELUTanh()": "gelu_pytorch_tanh"}

_TRUNK = r"^visual\.trunk\."
_TENSORS = (
    (r"^text\.text_projection\.", "text_model.head."),
    (r"^text\.", ""),
    *CLIP_TENSORS,
    (_TRUNK + r"patch_embed\.proj\.", "vision_model.embeddings.patch_embedding."),
    (_TRUNK + r"pos_embed$", "vision_model.embeddings.position_embedding.weight"),
    (_TRUNK + r"blocks\.", "vision_model.encoder.layers."),
    (_TRUNK + r"norm\.", "vision_model.post_layernorm."),
    (_TRUNK + r"attn_pool\.latent$", "vision_model.head.probe"),
    (_TRUNK + r"attn_pool\.proj\.", "vision_model.head.attention.out_proj."),
    (_TRUNK + r"attn_pool\.norm\.", "vision_model.head.layernorm."),
    (_TRUNK + r"attn_pool\.mlp\.", "vision_model.head.mlp."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.self_attn\.qkv\.", ".self_attn.in_proj_"),
    (r"\.self_attn\.proj\.", ".self_attn.out_proj."),
)


class SiglipArchitecture(ClipArchitecture):
    """``SiglipModel`` of transformers."""

    name = "Siglip"
    expressed: ClassVar[Expressed] = {
        **CLIP_SETTINGS,
        **TOKENIZER_SETTINGS,
        **dict.fromkeys(("custom_text", "no_causal_mask", "proj_bias", "timm_model_name"), bool),
        "init_logit_bias": lambda bias: bias is not None,
        "pool_type": lambda pooling: pooling == "last",
        "timm_proj": lambda projection: projection in (None, "", "none"),
    }
    renamed: ClassVar[tuple[tuple[str, str], ...]] = _TENSORS
    sees_padding = True

    def _text_settings(self, model: Mapping[str, Any]) -> Mapping[str, Any]:
        return {**_UNSAID, **model["text_cfg"]}

    def _tokenizer_problems(self, tokenizer: str) -> list[str]:
        return []

    def module_problems(self, module: Any) -> list[str]:
        """Name what of a module, beside its settings, the architecture cannot express."""
        trunk = module.visual.trunk
        if type(trunk).__name__ != "VisionTransformer":
            return [f"its image tower is timm's {type(trunk).__name__}, not its VisionTransformer"]
        activation = str(trunk.blocks[0].mlp.act)
        return [] if activation in _ACTIVATIONS else [f"the activation of its image tower is {activation}"]

    def make_config(self, model: Mapping[str, Any], logit_scale: float, module: Any = None) -> Any:
        """Translate open_clip's ``model_cfg``, and what only its module says of timm's tower; the scale is a tensor here."""
        import transformers

        trunk = module.visual.trunk
        block = trunk.blocks[0]
        vision = {
            "image_size": int(trunk.patch_embed.img_size[0]),
            "patch_size": int(trunk.patch_embed.patch_size[0]),
            "hidden_size": int(trunk.embed_dim),
            "intermediate_size": int(block.mlp.fc1.out_features),
            "num_hidden_layers": len(trunk.blocks),
            "num_attention_heads": int(block.attn.num_heads),
            "hidden_act": _ACTIVATIONS[str(block.mlp.act)],
            "layer_norm_eps": float(trunk.norm.eps),
        }
        text = text_config(model) | {"projection_size": int(model["embed_dim"])} | dict.fromkeys(_SPECIAL_TOKENS)
        return transformers.SiglipConfig(vision_config=vision, text_config=text)

    def rename(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the tensors of a SigLIP of open_clip under transformers' names.

        timm stores the queries of its pooling beside its keys and values, PyTorch all three in one matrix.
        """
        renamed = super().rename(tensors)
        for part in ("weight", "bias"):
            queries, others = (renamed.pop(f"visual.trunk.attn_pool.{name}.{part}") for name in ("q", "kv"))
            renamed[f"vision_model.head.attention.in_proj_{part}"] = torch.cat([queries, others])
        position = "vision_model.embeddings.position_embedding.weight"
        renamed[position] = renamed[position].flatten(0, 1)
        return renamed | {name: renamed[name].reshape(1) for name in ("logit_scale", "logit_bias")}
