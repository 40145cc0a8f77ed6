"""A tokenizer as `tokenizer.json`, which the library tokenizers reads without open_clip, transformers or a network.

It pads and cuts texts to the model's length, as open_clip does. It does not clean them first, as open_clip does (curly
quotes, HTML entities, broken encodings).
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from clipcid_cli.formats.atomic import write_bytes, write_text
from clipcid_cli.formats.models.export_folder import MERGES, TOKENIZER, VOCABULARY

BOS_ID, EOS_ID = 49406, 49407


def write_clip_tokenizer(folder: Path, tokenizer: Any) -> Any:
    """Write the vocabulary and merges of open_clip's ``SimpleTokenizer``; return transformers' tokenizer of them."""
    import transformers

    # Its own special tokens are called otherwise, and are the last two.
    words = {text: number for text, number in tokenizer.encoder.items() if number < BOS_ID}
    words |= {"<|startoftext|>": BOS_ID, "<|endoftext|>": EOS_ID}
    write_text(folder / VOCABULARY, json.dumps(words, ensure_ascii=False) + "\n")
    merges = "".join(f"{left} {right}\n" for left, right in tokenizer.bpe_ranks)
    write_text(folder / MERGES, "#version: 0.2\n" + merges)
    length = int(tokenizer.context_length)
    made = transformers.CLIPTokenizerFast.from_pretrained(folder, model_max_length=length)
    _fix_length(made.backend_tokenizer, length, 0, made.pad_token)
    return made


def fits_tokenizer_file(tokenizer: Any) -> bool:
    """Tell whether `tokenizer.json` can express an open_clip tokenizer, which replaces some tokens of Hugging Face's."""
    if not hasattr(tokenizer, "tokenizer"):
        return True
    return tokenizer.tokenizer.is_fast and not (tokenizer.tokenizer_mode or tokenizer.strip_sep_token)


def write_tokenizer_file(folder: Path, tokenizer: Any) -> None:
    """Write `tokenizer.json` of an open_clip tokenizer that it can express."""
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
