"""A tiny random model of each family that open_clip 3.3 builds, as a folder with its own tokenizer."""

from __future__ import annotations

import dataclasses
import json
import shutil
import string
from pathlib import Path
from typing import Any

from conftest import changed, make_caption

_WIDTH = 32
_TEXT = {"text_cfg__width": _WIDTH, "text_cfg__heads": 2, "text_cfg__layers": 2}
_CLIP = {"embed_dim": _WIDTH, "vision_cfg__image_size": 32, **_TEXT}
_VIT = _CLIP | {"vision_cfg__width": _WIDTH, "vision_cfg__layers": 2, "vision_cfg__head_width": 16}
_DECODER = {"multimodal_cfg__width": _WIDTH, "multimodal_cfg__heads": 2, "multimodal_cfg__layers": 1}
_DECODER |= {"multimodal_cfg__attn_pooler_heads": 2}
_TRUNK = {"img_size": 32, "embed_dim": _WIDTH, "depth": 2, "num_heads": 2}
_EVA = _TRUNK | {"ref_feat_shape": [2, 2]}
_FASTVIT = {"layers": [1, 1, 1, 1], "embed_dims": [16, 16, 32, 32]}
_HF_SIZES = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": _WIDTH, "intermediate_size": 64}
_M2M = {"d_model": _WIDTH, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The kind of a Hugging Face tokenizer, as its folder on the hub describes it."""

    tokenizer_class: str
    model: str  # of the library tokenizers
    special: tuple[str, ...]  # the first tokens, in order
    template: str  # of one text, $A
    pad: str = "<pad>"
    described: dict[str, Any] = dataclasses.field(default_factory=dict)


_T5 = Vocabulary("T5TokenizerFast", "Unigram", ("<pad>", "</s>", "<unk>"), "$A </s>", described={"extra_ids": 0})
_C4 = dataclasses.replace(_T5, pad="</s>")  # SigLIP pads with the end
_GEMMA = Vocabulary(
    "GemmaTokenizerFast",
    "BPE",
    ("<pad>", "<eos>", "<bos>", "<unk>"),
    "$A <eos>",
    described={"padding_side": "right", "add_bos_token": False, "add_eos_token": True},
)
_XLM = Vocabulary("XLMRobertaTokenizerFast", "Unigram", ("<s>", "<pad>", "</s>", "<unk>", "<mask>"), "<s> $A </s>")
_NLLB = Vocabulary("NllbTokenizerFast", "BPE", ("<s>", "<pad>", "</s>", "<unk>", "eng_Latn"), "eng_Latn $A </s>")


@dataclasses.dataclass(frozen=True)
class Family:
    """An architecture of open_clip, and what of it is smaller here; all else stays: pooling, activation, kind of layers."""

    architecture: str
    smaller: dict[str, Any]
    trunk: dict[str, Any] | None = None  # of timm's model
    text: tuple[str, dict[str, Any]] | None = None  # kind and sizes of a Hugging Face text tower
    vocabulary: Vocabulary | None = None


FAMILIES = {
    "ViT": Family("ViT-B-16", _VIT),
    "ResNet": Family("RN50", _CLIP | {"vision_cfg__layers": [1, 1, 1, 1], "vision_cfg__width": 16}),
    "ConvNeXt": Family("convnext_base_w", _CLIP, {"depths": [1, 1, 1, 1], "dims": [8, 16, 16, _WIDTH]}),
    "SigLIP": Family("ViT-B-16-SigLIP", _CLIP, _TRUNK, vocabulary=_C4),
    "SigLIP 2": Family("ViT-B-16-SigLIP2-256", _CLIP, _TRUNK, vocabulary=_GEMMA),
    "CoCa": Family(
        "coca_ViT-B-32", _VIT | {"vision_cfg__attn_pooler_heads": 2, "vision_cfg__patch_size": 16} | _DECODER
    ),
    "MobileCLIP": Family("MobileCLIP-S1", _CLIP | {"vision_cfg__image_size": 64}, _FASTVIT),
    "MobileCLIP 2": Family("MobileCLIP2-S0", _CLIP | {"vision_cfg__image_size": 64}, _FASTVIT),
    "MobileCLIP 2 (ViT)": Family("MobileCLIP2-L-14", _CLIP, _TRUNK | {"patch_size": 16}),
    "PE": Family("PE-Core-T-16-384", _CLIP, _EVA | {"attn_pool_num_heads": 2}),
    "MetaCLIP 2": Family("ViT-H-14-worldwide-quickgelu", _VIT | {"vision_cfg__patch_size": 16}, vocabulary=_XLM),
    "MetaCLIP 2 (mT5)": Family("ViT-L-14-worldwide", _VIT | {"vision_cfg__patch_size": 16}, vocabulary=_T5),
    "EVA-02": Family("EVA02-B-16", _CLIP, _EVA),
    "XLM-R": Family("xlm-roberta-base-ViT-B-32", _VIT, text=("xlm-roberta", _HF_SIZES), vocabulary=_XLM),
    "NLLB": Family("nllb-clip-base", _VIT, text=("m2m_100", _M2M), vocabulary=_NLLB),
    "Swin (timm)": Family(
        "swin_base_patch4_window7_224",
        _CLIP,
        {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "img_size": 32, "window_size": 4},
    ),
}


def write_family(folder: Path, family: Family) -> Path:
    """Write the folder of a family's model, without weights: its configuration and its tokenizer."""
    import open_clip

    folder.mkdir(parents=True)
    config = changed(open_clip.get_model_config(family.architecture), **family.smaller)
    if family.trunk is not None:
        trunk = {
            "architecture": config["vision_cfg"]["timm_model_name"],
            "model_args": family.trunk,
            "pretrained_cfg": {},
        }
        (folder / "trunk").mkdir()
        (folder / "trunk" / "config.json").write_text(json.dumps(trunk))
        config["vision_cfg"]["timm_model_name"] = f"local-dir:{folder / 'trunk'}"
    if family.vocabulary is not None:
        config["text_cfg"]["vocab_size"] = write_tokenizer(folder, family.vocabulary)
    if family.text is not None:
        write_text_config(folder, *family.text, vocab_size=config["text_cfg"].pop("vocab_size"))
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    return folder


def carry_trunk(source: Path, model: Path) -> None:
    """Copy a tower that is a folder, not one of timm's names, into a model's own: a model names none outside its folder."""
    if not (source / "trunk").exists():
        return
    shutil.copytree(source / "trunk", model / "trunk", dirs_exist_ok=True)
    file = model / "open_clip_config.json"
    config = json.loads(file.read_text())
    config["model_cfg"]["vision_cfg"]["timm_model_name"] = f"local-dir:{model / 'trunk'}"
    file.write_text(json.dumps(config))


def write_tokenizer(folder: Path, vocabulary: Vocabulary) -> int:
    """Train a tokenizer on captions and write its files; return the size of its vocabulary."""
    import tokenizers
    from tokenizers import models, pre_tokenizers, processors, trainers

    special = list(vocabulary.special)
    made = tokenizers.Tokenizer(getattr(models, vocabulary.model)())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    options = {"unk_token": "<unk>"} if vocabulary.model == "Unigram" else {}
    trainer = getattr(trainers, f"{vocabulary.model.capitalize()}Trainer")(
        vocab_size=200, special_tokens=special, initial_alphabet=list(string.printable), show_progress=False, **options
    )
    made.train_from_iterator(map(make_caption, range(200)), trainer)
    made.post_processor = processors.TemplateProcessing(
        single=vocabulary.template, special_tokens=[(word, number) for number, word in enumerate(special)]
    )
    made.save(str(folder / "tokenizer.json"))
    described = {
        "tokenizer_class": vocabulary.tokenizer_class,
        "pad_token": vocabulary.pad,
        "eos_token": vocabulary.template.split()[-1],
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(described | vocabulary.described))
    return int(made.get_vocab_size())


def write_text_config(folder: Path, kind: str, sizes: dict[str, Any], vocab_size: int) -> None:
    """Write the configuration of a Hugging Face text tower."""
    import transformers

    transformers.AutoConfig.for_model(kind, vocab_size=vocab_size, **sizes).save_pretrained(folder)
