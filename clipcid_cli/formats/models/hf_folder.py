"""A folder that ``CLIPModel.from_pretrained`` and ``CLIPProcessor.from_pretrained`` read, written without transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from clipcid_cli.formats.atomic import write_bytes, write_json, write_text
from clipcid_cli.formats.models.hf_config import BOS, BOS_ID, EOS, EOS_ID, HfDescription

HF_CONFIG = "config.json"
HF_WEIGHTS = "model.safetensors"
HF_PREPROCESSOR = "preprocessor_config.json"
HF_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")

# Names in open_clip and in Hugging Face, which spells `pre_layrnorm` so.
_NAMES = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
    "logit_scale": "logit_scale",
}
_PROJECTIONS = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
_BLOCKS = {"visual.transformer.resblocks.": "vision_model", "transformer.resblocks.": "text_model"}
_BLOCK_NAMES = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
# How a text is split into words before the merges, as in Hugging Face's own CLIP folders.
_SPLIT = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def write_hf_folder(
    folder: Path,
    description: HfDescription,
    tensors: Mapping[str, torch.Tensor],
    *,
    dtype: torch.dtype,
    vocabulary: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
) -> None:
    """Write the folder.

    Args:
        folder: Where to write. ``config.json`` is written last, so a folder that has one is whole.
        description: As `describe_as_hf` returns it.
        tensors: State dict of the open_clip module.
        dtype: Number format of the stored weights.
        vocabulary: Tokens of open_clip's tokenizer by text, the two special ones last.
        merges: Its byte-pair merges, in order of priority.
    """
    stored = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in rename_tensors(tensors)}
    write_bytes(folder / HF_WEIGHTS, save(stored, metadata={"format": "pt"}))
    words = {text: number for text, number in vocabulary.items() if number < BOS_ID} | {BOS: BOS_ID, EOS: EOS_ID}
    write_text(folder / "vocab.json", json.dumps(words, ensure_ascii=False) + "\n")
    write_text(folder / "merges.txt", "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges))
    write_text(folder / "tokenizer.json", json.dumps(_tokenizer(words, merges), ensure_ascii=False) + "\n")
    special = {name: description.tokenizer[name] for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    write_json(folder / "special_tokens_map.json", special)
    write_json(folder / "tokenizer_config.json", description.tokenizer)
    write_json(folder / HF_PREPROCESSOR, description.preprocessor)
    # transformers 4 reads `torch_dtype`, 5 reads it too.
    write_json(folder / HF_CONFIG, description.config | {"torch_dtype": str(dtype).removeprefix("torch.")})


def rename_tensors(tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of an open_clip CLIP under Hugging Face's names.

    open_clip stores queries, keys and values in one matrix, and projections as [width, D], multiplied from the right.

    Raises:
        ValueError: when a tensor has no counterpart there; `describe_as_hf` refuses such models.
    """
    for name, tensor in tensors.items():
        if name in _PROJECTIONS:
            yield _PROJECTIONS[name], tensor.T
        elif name == "logit_scale":
            yield name, tensor.reshape(())
        elif prefix := next((prefix for prefix in _BLOCKS if name.startswith(prefix)), None):
            layer, _, inner = name.removeprefix(prefix).partition(".")
            yield from _rename_in_block(f"{_BLOCKS[prefix]}.encoder.layers.{layer}", inner, tensor)
        else:
            yield _rename(name, _NAMES), tensor


def _rename_in_block(block: str, inner: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    if inner.startswith("attn.in_proj_"):
        kind = inner.removeprefix("attn.in_proj_")
        for letter, part in zip("qkv", tensor.chunk(3), strict=True):
            yield f"{block}.self_attn.{letter}_proj.{kind}", part
    else:
        yield f"{block}.{_rename(inner, _BLOCK_NAMES)}", tensor


def _rename(name: str, names: Mapping[str, str]) -> str:
    if name in names:
        return names[name]
    module, _, kind = name.rpartition(".")
    if module not in names:
        raise ValueError(f"tensor {name} has no counterpart in CLIPModel")
    return f"{names[module]}.{kind}"


def _tokenizer(words: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Return ``tokenizer.json`` of the tokenizers library: CLIP's lower-cased byte-level byte-pair encoding."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, "content": text} | flags for text, number in ((BOS, BOS_ID), (EOS, EOS_ID))],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "NFC"},
                {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
                {"type": "Lowercase"},
            ],
        },
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": _SPLIT}, "behavior": "Removed", "invert": True},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
            ],
        },
        "post_processor": {
            "type": "RobertaProcessing",
            "sep": [EOS, EOS_ID],
            "cls": [BOS, BOS_ID],
            "trim_offsets": False,
            "add_prefix_space": False,
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": EOS,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "</w>",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": dict(words),
            "merges": [f"{left} {right}" for left, right in merges],
        },
    }
