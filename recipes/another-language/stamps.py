"""Make pairs and a student of Tux Paint's stamps: python stamps.py STAMPS OUT LANGUAGE (see run.sh).

A stamp is a picture beside a text, whose first line is English and whose others begin with a language: ``fr.utf8=…``.
"""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path

import tokenizers
from tokenizers import models, pre_tokenizers, processors, trainers

from clipcid_cli.runtime.randomness import key_fractions

TEST_SHARE = 0.2
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]  # XLM-R's, in its order
MOST_TOKENS = 4_000
IMAGE_TOWER = {"image_size": 64, "patch_size": 8, "width": 96, "layers": 3, "head_width": 32}
TEXT_TOWER = {"context_length": 24, "width": 96, "heads": 3, "layers": 2, "hf_tokenizer_name": "xlm-roberta-base"}


def main() -> None:
    """Write the pairs to train on, those to test on, and the student's folder."""
    stamps, out, language = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    read = {path: read_texts(path.with_suffix(".txt"), language) for path in sorted(stamps.rglob("*.png"))}
    texts = {path: pair for path, pair in read.items() if pair[0]}
    names = [path.relative_to(stamps).with_suffix("").as_posix().replace(".", "-") for path in texts]
    is_test = key_fractions(names) < TEST_SHARE
    for part, wanted in (("pairs", False), ("test", True)):
        (out / part).mkdir(parents=True, exist_ok=True)
        with tarfile.open(out / part / "0.tar", "w") as archive:
            for (path, (english, other)), name, tested in zip(texts.items(), names, is_test, strict=True):
                if tested == wanted:
                    add(archive, f"{name}.png", path.read_bytes())
                    add(archive, f"{name}.txt", english.encode())
                    if other:
                        add(archive, f"{name}.{language}.txt", other.encode())
    write_student(out / "student", [other for _, other in texts.values() if other])
    print(f"{len(texts):,} stamps, {sum(bool(other) for _, other in texts.values()):,} of them in {language}.")


def read_texts(path: Path, language: str) -> tuple[str, str]:
    """Return the English line and its translation, each empty where there is none."""
    if not path.exists():
        return "", ""
    english, *others = path.read_text(encoding="utf-8").splitlines()
    translated = (line.partition("=")[2] for line in others if line.startswith(f"{language}.utf8="))
    return english.strip(), next(translated, "").strip()


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    """Add a file to a shard."""
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))


def write_student(folder: Path, captions: list[str]) -> None:
    """Write a small architecture, with a tokenizer of XLM-R's kind that has learned its pieces from some captions."""
    folder.mkdir(exist_ok=True)
    made = tokenizers.Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.train_from_iterator(
        captions,
        trainers.UnigramTrainer(vocab_size=MOST_TOKENS, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False),
    )
    ends = [(token, SPECIAL.index(token)) for token in ("<s>", "</s>")]
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    made.save(str(folder / "tokenizer.json"))
    described = {"tokenizer_class": "XLMRobertaTokenizerFast", "pad_token": "<pad>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(described | {"unk_token": "<unk>"}))
    text = TEXT_TOWER | {"vocab_size": made.get_vocab_size()}
    config = {"embed_dim": 192, "vision_cfg": IMAGE_TOWER, "text_cfg": text}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}, indent=1))


if __name__ == "__main__":
    main()
