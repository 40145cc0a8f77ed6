"""Tokenizers of models: CLIP's own, or the Hugging Face one that a configuration names."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from clipcid_cli.errors import ClipcidError, in_one_line
from clipcid_cli.runtime.models.hub import reaching_hub
from clipcid_cli.runtime.models.names import CONFIG_NAME, ModelName, read_json, validate_hub_name

Tokenizer = Callable[[list[str]], torch.Tensor]

LONGEST_TEXT = 8_192
"""Characters of a text that are tokenized: 100 for each of a CLIP's 77 tokens. What follows could hardly reach the model,
and a tokenizer's cleaning of a caption of megabytes takes minutes."""

_TOKENIZER_FILES = ("tokenizer*.json", "vocab.*", "*.model")
_VOCABULARY_ENTRIES = ("vocab_file", "merges_file", "spm_file", "source_spm", "target_spm", "tokenizer_file")
_TOKENIZER_HINT = (
    f"Name a model's folder that holds {CONFIG_NAME} and the tokenizer's files, tokenizer.json and others."
)


@dataclasses.dataclass(frozen=True)
class BoundedTokenizer:
    """A tokenizer that reads the first `LONGEST_TEXT` characters of each text; picklable."""

    whole: Any  # open_clip's own

    def __call__(self, texts: list[str]) -> torch.Tensor:
        """Return int64 [B, L]."""
        return cast(torch.Tensor, self.whole([text[:LONGEST_TEXT] for text in texts]))


def load_tokenizer(name: ModelName, config: dict[str, Any]) -> BoundedTokenizer:
    """Load CLIP's tokenizer, or the Hugging Face one that a configuration names: the folder's own, or else the hub's."""
    from clipcid_cli.runtime.models.guarded_open_clip import open_clip  # workers tokenize without it

    text = config["text_cfg"]
    options = {"context_length": text.get("context_length", 77)} | (text.get("tokenizer_kwargs") or {})
    hub_name = text.get("hf_tokenizer_name")
    if not hub_name:
        return BoundedTokenizer(open_clip.SimpleTokenizer(**options))
    folder = name.folder
    has_own = folder is not None and any(any(folder.glob(files)) for files in _TOKENIZER_FILES)
    load = partial(
        open_clip.tokenizer.HFTokenizer,
        tokenizer_mode=text.get("tokenizer_mode"),
        **options,
        trust_remote_code=False,  # a tokenizer of its own code is refused, not run
        local_files_only=has_own,
    )
    if not has_own:
        validate_hub_name(name, "hf_tokenizer_name", hub_name)
        with reaching_hub(f"files of {hub_name}, the tokenizer of model {name.spec},", _TOKENIZER_HINT):
            return BoundedTokenizer(load(hub_name))
    assert folder is not None
    _validate_tokenizer_files(folder)
    try:
        return BoundedTokenizer(load(folder))
    except Exception as error:  # transformers raises OSError, ValueError, ImportError and its own
        raise ClipcidError(
            f"The tokenizer of model {name.spec} could not be loaded from {folder}: {in_one_line(error, 400)}",
            f"Put all files of {hub_name} there (tokenizer.json, tokenizer_config.json, …).",
        ) from error


def _validate_tokenizer_files(folder: Path) -> None:
    """Refuse a `tokenizer_config.json` that names a file outside its folder, which transformers 4 opens as it is named."""
    file = folder / "tokenizer_config.json"
    content: Any = {}
    with contextlib.suppress(OSError, ValueError, RecursionError):  # whatever is wrong with it, transformers tells
        content = read_json(file)
    for entry in _VOCABULARY_ENTRIES:
        value = content.get(entry) if isinstance(content, dict) else None
        if (
            isinstance(value, str)
            and os.path.exists(value)
            and not Path(value).resolve().is_relative_to(folder.resolve())
        ):
            raise ClipcidError(
                f"{file}: {entry} is {value!r}, a file outside the model's folder.",
                f"Choose another model, or remove the entry {entry}.",
            )
