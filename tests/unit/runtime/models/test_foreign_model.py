"""A model of other parts than CLIP's: a timm image tower, a Hugging Face text tower with its own tokenizer."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.models.hf_folder import fits_tokenizer_file, write_tokenizer_file
from clipcid_cli.formats.models.open_clip_folder import write_model_folder
from clipcid_cli.runtime.models.exported import read_tokens
from clipcid_cli.runtime.models.guarded_open_clip import import_towers
from clipcid_cli.runtime.models.load import load_model
from clipcid_cli.runtime.models.names import parse_model
from clipcid_cli.runtime.models.renderer import Renderer
from clipcid_cli.runtime.precision import choose_precision

TEXTS = ["a red square", "two green circles , striped"]
FP32 = choose_precision("fp32", torch.device("cpu"), "embed", 0)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An open_clip folder with timm's smallest network and a BERT of one layer; the weights are random."""
    import open_clip.hf_model
    import transformers

    folder = tmp_path_factory.mktemp("foreign")
    words = sorted({word for text in TEXTS for word in text.split()})
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    transformers.BertTokenizerFast.from_pretrained(folder, vocab_file=str(folder / "vocab.txt")).save_pretrained(folder)
    sizes = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    transformers.BertConfig(vocab_size=5 + len(words), **sizes).save_pretrained(folder)
    config = {
        "embed_dim": 48,
        "vision_cfg": {"timm_model_name": "test_efficientnet", "timm_pool": "avg", "image_size": 64},
        "text_cfg": {
            "hf_model_name": str(folder),
            "hf_tokenizer_name": str(folder),
            "hf_pooler_type": "mean_pooler",
            "hf_proj_type": None,
            "context_length": 9,
        },
    }
    import_towers(config)  # a test before may have imported open_clip as clipcid does
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    torch.manual_seed(0)
    module = open_clip.create_model(f"local-dir:{folder}", load_weights=False, pretrained_text=False)
    write_model_folder(folder, config, preprocess, module.state_dict())
    return folder


def test_rows_and_tokens_are_open_clips(foreign: Path) -> None:
    import open_clip

    model = load_model(parse_model(str(foreign)))
    theirs, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{foreign}")
    photo = Image.linear_gradient("L").convert("RGB")
    with torch.no_grad():
        expected = theirs.eval().encode_image(preprocess(photo)[None], normalize=True)
        texts = theirs.encode_text(open_clip.get_tokenizer(f"local-dir:{foreign}")(TEXTS), normalize=True)
    pixels = torch.from_numpy(np.stack([Renderer(model.info.preprocess)(photo)]))
    assert torch.equal(model.encode_images(pixels, FP32), expected)
    tokens = pickle.loads(pickle.dumps(model.tokenizer))(TEXTS)
    assert tokens.shape == (2, 9)
    assert (tokens != 1).all(), "a word is unknown: the tokenizer is not the model's own"
    assert torch.equal(model.encode_texts(tokens, FP32), texts)
    assert (model.info.embed_dim, model.info.context_length, model.info.image_size) == (48, 9, (64, 64))


def test_its_tokenizer_is_one_file(foreign: Path, tmp_path: Path) -> None:
    whole = load_model(parse_model(str(foreign))).tokenizer.whole
    texts = [*TEXTS, "red " * 20]
    assert fits_tokenizer_file(whole)
    write_tokenizer_file(tmp_path, whole)
    assert torch.equal(read_tokens(tmp_path / "tokenizer.json", texts), whole(texts))
    assert torch.equal(whole(texts), load_model(parse_model(str(foreign))).tokenizer(texts)), (
        "its own is left as it was"
    )


def test_copy_loads_where_the_folder_it_was_built_in_is_gone(foreign: Path, tmp_path: Path) -> None:
    elsewhere = shutil.copytree(foreign, tmp_path / "before")
    config = json.loads((elsewhere / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["hf_model_name"] = str(tmp_path / "gone")
    (elsewhere / "open_clip_config.json").write_text(json.dumps(config))
    model = load_model(parse_model(str(elsewhere)))
    write_model_folder(
        tmp_path / "written",
        model.info.config,
        model.info.preprocess,
        model.module.state_dict(),
        source=elsewhere,
        tokenizer=model.tokenizer.whole,
    )
    shutil.rmtree(elsewhere)
    written = load_model(parse_model(str(tmp_path / "written")))
    original = load_model(parse_model(str(foreign)))
    expected = original.encode_texts(original.tokenizer(TEXTS), FP32)
    assert torch.equal(written.encode_texts(written.tokenizer(TEXTS), FP32), expected)
    assert written.info.config["text_cfg"]["hf_model_name"] == str(tmp_path / "gone")


def test_a_tokenizer_from_elsewhere_is_written_whatever_stands_beside_the_configuration(
    foreign: Path, tmp_path: Path
) -> None:
    shutil.copy(foreign / "open_clip_config.json", tmp_path / "student.json")
    (tmp_path / "merges.txt").write_text("of another model")
    name = parse_model(str(tmp_path / "student.json"))
    student = load_model(name, fresh_seed=0)
    tensors, whole = student.module.state_dict(), student.tokenizer.whole
    written = tmp_path / "written"
    write_model_folder(
        written, student.info.config, student.info.preprocess, tensors, source=name.folder, tokenizer=whole
    )
    assert (written / "tokenizer.json").is_file()
    assert not (written / "merges.txt").exists()


def change(file: Path, entry: str, value: Any) -> None:
    """Set one entry of a JSON file, named by its path."""
    content = json.loads(file.read_text())
    *outer, last = entry.split(".")
    holder = content
    for name in outer:
        holder = holder[name]
    holder[last] = value
    file.write_text(json.dumps(content))


def refusal(folder: Path) -> str:
    with pytest.raises(ClipcidError) as raised:
        load_model(parse_model(str(folder)))
    return raised.value.message


def test_code_of_a_model_folder_is_never_executed(
    foreign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = tmp_path / "ran"
    tokenizer, tower = (shutil.copytree(foreign, tmp_path / name) for name in ("tokenizer", "tower"))
    for folder in (tokenizer, tower):
        (folder / "theirs.py").write_text(f"open({str(ran)!r}, 'w')\n")
    change(tokenizer / "tokenizer_config.json", "auto_map", {"AutoTokenizer": ["theirs.Tokenizer", None]})
    change(tokenizer / "open_clip_config.json", "model_cfg.text_cfg.tokenizer_kwargs", {"trust_remote_code": True})
    change(tower / "config.json", "auto_map", {"AutoConfig": "theirs.Config"})
    change(tower / "config.json", "model_type", "theirs")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))  # transformers asks whoever sits at a terminal
    messages = [refusal(folder) for folder in (tokenizer, tower)]
    assert not ran.exists()
    assert "tokenizer_kwargs has trust_remote_code" in messages[0]
    assert "custom code" in messages[1]


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("text_cfg.tokenizer_kwargs", {"bpe_path": "../secret.gz"}),
        ("vision_cfg.timm_model_name", "local-dir:../elsewhere"),
        ("vision_cfg.timm_model_name", "hf-hub:org/name"),
        ("text_cfg.hf_tokenizer_name", "../elsewhere"),
        ("text_cfg.hf_tokenizer_name", "elsewhere"),
        ("text_cfg.hf_model_name", "~/elsewhere"),
    ],
)
def test_a_model_folder_leads_to_no_other(
    foreign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: str, value: Any
) -> None:
    folder = shutil.copytree(foreign, tmp_path / "model")
    shutil.copytree(foreign, tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path / "model" if str(value).startswith("../") else tmp_path)
    own = {"hf_model_name": ["config.json"], "hf_tokenizer_name": ["tokenizer*.json", "vocab.txt"]}
    for pattern in own.get(entry.rpartition(".")[2], []):  # or they were taken, whatever the name
        for file in folder.glob(pattern):
            file.unlink()
    change(folder / "open_clip_config.json", f"model_cfg.{entry}", value)
    message = refusal(folder)
    assert entry in message
    assert (value if isinstance(value, str) else "bpe_path") in message


def test_a_written_model_asks_for_no_code(foreign: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(foreign, tmp_path / "model")
    change(folder / "config.json", "auto_map", {"AutoModel": "theirs.Model"})
    change(folder / "tokenizer_config.json", "auto_map", {"AutoTokenizer": ["theirs.Tokenizer", None]})
    model = load_model(parse_model(str(folder)))  # of the classes that transformers has itself
    info, tensors = model.info, model.module.state_dict()
    written = tmp_path / "written"
    write_model_folder(written, info.config, info.preprocess, tensors, source=folder, tokenizer=model.tokenizer.whole)
    assert (written / "config.json").is_file()
    assert [file.name for file in written.glob("*.json") if "auto_map" in file.read_text()] == []


def test_a_tokenizer_names_no_file_outside_its_folder(foreign: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(foreign, tmp_path / "model")
    (tmp_path / "secret").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nsecret\n")
    change(folder / "tokenizer_config.json", "vocab_file", str(tmp_path / "secret"))
    assert "vocab_file" in refusal(folder)
