"""An open_clip model as a folder that ``AutoModel`` and ``AutoProcessor`` of transformers read, or why there is none.

Also ``tokenizer.json``, which the ONNX form has too.
"""

from __future__ import annotations

import copy
import json
import re
import string
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.files import write_bytes, write_json, write_text
from clipcid_cli.formats.models.export_folder import (
    HF_WEIGHTS,
    MERGES,
    SPECIAL_TOKENS,
    ST_MODULES,
    ST_SETTINGS,
    TOKENIZER,
    VOCABULARY,
)
from clipcid_cli.formats.models.hf_clip import BOS_ID, EOS_ID, ClipArchitecture, MetaClip2Architecture
from clipcid_cli.formats.models.hf_siglip import SiglipArchitecture
from clipcid_cli.formats.models.open_clip_folder import HF_CONFIG, RESAMPLE, refusals_of_the_system, square_side


def find_architecture(model: Mapping[str, Any]) -> ClipArchitecture:
    """Choose the architecture of transformers that is the most likely to express a model of open_clip."""
    text = model["text_cfg"]
    if model["vision_cfg"].get("timm_pool") == "map" and text.get("pool_type") == "last":
        return SiglipArchitecture()
    if text.get("hf_tokenizer_name") and text.get("pool_type") == "eos":
        return MetaClip2Architecture()
    return ClipArchitecture()


def validate_for_hf(
    model: Mapping[str, Any], preprocess: Mapping[str, Any], tokenizer: str, module: torch.nn.Module | None = None
) -> None:
    """Refuse a model of open_clip that transformers cannot express."""
    architecture = find_architecture(model)
    problems = architecture.problems(model, preprocess, tokenizer)
    if module is not None and not problems:
        problems = architecture.module_problems(module)
    if problems:
        raise _refusal(architecture, problems)


def _refusal(architecture: ClipArchitecture, problems: Sequence[str]) -> ClipcidError:
    return ClipcidError(
        f"--format hf: Hugging Face's {architecture.name}Model cannot express this model: {'; '.join(problems)}.",
        "Export it with --format open-clip or onnx.",
    )


def write_hf_folder(
    folder: Path,
    model: Mapping[str, Any],
    preprocess: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    module: torch.nn.Module,
    tokenizer: Any,
) -> None:
    """Write the folder of a model that `validate_for_hf` accepted, with its module and open_clip's tokenizer of it."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    architecture = find_architecture(model)
    config = architecture.make_config(model, float(tensors["logit_scale"]), module)
    with torch.device("meta"):
        empty = getattr(transformers, f"{architecture.name}Model")(config)
    renamed = architecture.rename(tensors)
    ours, theirs = ({(name, tensor.shape) for name, tensor in side.items()} for side in (renamed, empty.state_dict()))
    if unlike := sorted(name for name, _ in ours ^ theirs):
        raise _refusal(architecture, [f"they do not have the same tensors ({', '.join(unlike[:3])})"])
    empty.load_state_dict(renamed, assign=True)
    write_hf_settings(folder, config, preprocess, tokenizer)
    if architecture.sees_padding:
        _write_sentence_transformers(folder)
    with refusals_of_the_system(folder):
        empty.save_pretrained(folder, max_shard_size="1TB")  # in one file
    # safetensors lets the owner alone read it.
    (folder / HF_WEIGHTS).chmod((folder / HF_CONFIG).stat().st_mode)


def write_hf_settings(folder: Path, config: Any, preprocess: Mapping[str, Any], tokenizer: Any) -> None:
    """Write all of `write_hf_folder` but the weights."""
    write_tokenizer = write_own_tokenizer if hasattr(tokenizer, "tokenizer") else write_clip_tokenizer
    written_tokenizer = write_tokenizer(folder, tokenizer)
    with refusals_of_the_system(folder):
        config.save_pretrained(folder)
        make_image_processor(preprocess).save_pretrained(folder)
        written_tokenizer.save_pretrained(folder)
    # transformers 5 leaves this file out, and other programs read it.
    write_json(folder / SPECIAL_TOKENS, written_tokenizer.special_tokens_map)


def _write_sentence_transformers(folder: Path) -> None:
    """Let sentence-transformers pad texts to the model's length; by default it pads them to the longest of a batch.

    The rest is what it would find out by itself.
    """
    features = {
        modality: {"method": f"get_{modality}_features", "method_output_name": "pooler_output"}
        for modality in ("text", "image")
    }
    settings = {
        "transformer_task": "feature-extraction",
        "modality_config": features,
        "module_output_name": "sentence_embedding",
        "processing_kwargs": {"text": {"padding": "max_length"}},
    }
    module = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"}
    write_json(folder / ST_MODULES, [module])
    write_json(folder / ST_SETTINGS, settings)


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


def write_own_tokenizer(folder: Path, tokenizer: Any) -> Any:
    """Return transformers' tokenizer of an open_clip tokenizer that `fits_tokenizer_file`; it writes its files itself.

    It gives no attention mask: open_clip's text towers attend to padding, or are read before it.
    """
    import transformers

    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=_make_own_tokenizer(tokenizer),
        model_max_length=int(tokenizer.context_length),
        model_input_names=["input_ids"],
        **tokenizer.tokenizer.special_tokens_map,
    )


def _make_own_tokenizer(tokenizer: Any) -> Any:
    """Return a Hugging Face tokenizer of open_clip of the library tokenizers, which cleans and pads as it does."""
    from tokenizers import normalizers

    own = tokenizer.tokenizer
    fast = copy.deepcopy(own.backend_tokenizer)
    steps = [*_cleaning(tokenizer.clean_fn), *([] if fast.normalizer is None else [fast.normalizer])]
    fast.normalizer = normalizers.Sequence(steps)
    _fix_length(fast, int(tokenizer.context_length), own.pad_token_id, own.pad_token)
    return fast


def _cleaning(clean: Callable[[str], str]) -> list[Any]:
    """Return the steps of open_clip's ``canonicalize``, ``lower`` or ``whitespace`` that the library tokenizers have."""
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if clean("a.") == "a":
        punctuation = "".join(re.escape(letter) for letter in string.punctuation)
        steps += [normalizers.Replace("_", " "), normalizers.Replace(Regex(f"[{punctuation}]"), "")]
    if clean("A") == "a":
        steps.append(normalizers.Lowercase())
    return [*steps, normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]


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
        fast = _make_own_tokenizer(tokenizer)
    write_bytes(folder / TOKENIZER, fast.to_str().encode())


def _fix_length(fast: Any, length: int, pad_id: int, pad_token: str) -> None:
    fast.enable_truncation(length)
    fast.enable_padding(length=length, pad_id=pad_id, pad_token=pad_token)
