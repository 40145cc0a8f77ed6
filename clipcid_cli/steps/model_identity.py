"""Whether the model recorded in a sidecar is the one that a name refers to, and if not, how they differ."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from clipcid_cli.errors import ClipcidError, command_line
from clipcid_cli.formats.embeddings.command import embed_command
from clipcid_cli.formats.sidecar import DataSpec, ModelRecord
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.runtime.models.clip_model import hash_weights
from clipcid_cli.runtime.models.names import ModelName, find_weights, read_config
from clipcid_cli.steps.settings.distill import DistillSettings

# The entries of a configuration's text tower that determine the tokens.
_TOKENS = ("context_length", "hf_tokenizer_name", "tokenizer_kwargs")


class ModelMismatch(NamedTuple):
    """What differs between a recorded model and a named one, as in "have other {what}", and its two values."""

    what: str
    recorded: str
    named: str


def find_mismatch(recorded: ModelRecord, name: ModelName) -> ModelMismatch | None:
    """Compare a model recorded in a sidecar with a named one; None when they are the same.

    Weights given by a tag never change, so such a model is identified by its name; a folder by its weights' bytes, its
    tokenizer, its preprocessing and its architecture.
    """
    weights = find_weights(name.path) if name.path is not None else None
    if weights is None or name.path is None:
        return None if recorded.spec == name.spec else ModelMismatch("weights", recorded.spec, name.spec)
    config, preprocess = read_config(name.path)
    weights_hash = hash_weights(weights)
    if recorded.weights_hash != weights_hash:
        return ModelMismatch("weights", recorded.weights_hash, weights_hash)
    old_config = recorded.config
    found = _compare("tokenizer", old_config["text_cfg"], config["text_cfg"], _TOKENS)
    # The size is the architecture's, whatever the preprocessing says.
    pixels = tuple(key for key in preprocess if key != "size")
    found = found or _compare("preprocessing", recorded.preprocess, preprocess, pixels)
    return found or _compare("architecture", old_config, config, tuple(sorted({*old_config, *config})))


def _compare(what: str, recorded: dict[str, Any], named: dict[str, Any], keys: tuple[str, ...]) -> ModelMismatch | None:
    for key in keys:
        if recorded.get(key) != named.get(key):
            old, new = (json.dumps(values.get(key)) for values in (recorded, named))
            return ModelMismatch(what, f"{key} {old}", f"{key} {new}")
    return None


def validate_teacher(what: str, recorded: ModelRecord, teacher: ModelName, fix: str) -> None:
    """Refuse what another model than the teacher made."""
    difference = find_mismatch(recorded, teacher)
    if difference is not None:
        raise ClipcidError(
            f"The {what} are of {recorded.spec}, {difference.what} {difference.recorded}; the teacher is {teacher.spec}, "
            f"{difference.what} {difference.named}.",
            fix,
        )


def embed_with(name: ModelName, settings: DistillSettings, data: DataSpec | None = None) -> str:
    """Return the command that embeds the data of a run, else `data`, with another model, for a fix."""
    return embed_command(name.spec, data, settings.data, **settings.data_flags, work=settings.work)


def cluster_with(name: ModelName, settings: DistillSettings) -> str:
    """Return the fix that makes clusters of a model whose embeddings may not exist yet."""
    embeddings = WorkDirectory(settings.work).embeddings(name.slug)
    cluster = command_line("cluster", embeddings=embeddings, work=settings.work, overwrite=True)
    return f"Run: {embed_with(name, settings)}\nThen run: {cluster}"
