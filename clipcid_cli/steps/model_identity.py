"""Whether the model a sidecar describes is the one a name stands for, and if not, in what they differ."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from clipcid_cli.runtime.models.clip_model import hash_weights
from clipcid_cli.runtime.models.names import ModelName, find_weights, read_config

# What of a configuration's text tower decides the tokens.
_TOKENS = ("context_length", "hf_tokenizer_name", "tokenizer_kwargs")


@dataclasses.dataclass(frozen=True)
class Difference:
    """What tells two models apart.

    Attributes:
        what: A name for it, as in "have other {what}".
        named: What is true of the named model.
    """

    what: str
    recorded: str
    named: str


def find_difference(recorded: dict[str, Any], name: ModelName) -> Difference | None:
    """Compare what a sidecar says of a model with a named one; None when they are the same.

    Weights given by a tag never change, so such a model is known by its name; a folder by its weights' bytes, its tokenizer,
    its preprocessing and its architecture.

    Args:
        recorded: Entry ``model`` of a sidecar.
    """
    weights = find_weights(name.path) if name.path is not None else None
    if weights is None or name.path is None:
        return None if recorded["spec"] == name.spec else Difference("weights", recorded["spec"], name.spec)
    config, preprocess = read_config(name.path)
    weights_hash = hash_weights(weights)
    if recorded["weights_hash"] != weights_hash:
        return Difference("weights", recorded["weights_hash"], weights_hash)
    there, here = recorded["config"], config
    found = _compare("tokenizer", there["text_cfg"], here["text_cfg"], _TOKENS)
    # The size is the architecture's, whatever the configuration says.
    pixels = tuple(key for key in preprocess if key != "size")
    found = found or _compare("preprocessing", recorded["preprocess"], preprocess, pixels)
    return found or _compare("architecture", there, here, tuple(sorted({*there, *here})))


def is_of(recorded: dict[str, Any], name: ModelName) -> bool:
    """Tell whether what a sidecar says of a model is true of `name`."""
    return find_difference(recorded, name) is None


def _compare(what: str, there: dict[str, Any], here: dict[str, Any], keys: tuple[str, ...]) -> Difference | None:
    for key in keys:
        if there.get(key) != here.get(key):
            old, new = (json.dumps(values.get(key)) for values in (there, here))
            return Difference(what, f"{key} {old}", f"{key} {new}")
    return None
