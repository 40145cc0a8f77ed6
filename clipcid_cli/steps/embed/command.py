"""The command that makes embeddings as they are, or with more beside them: for the fix of an error."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Any

from clipcid_cli.steps.embed.inputs import recorded_augmentation
from clipcid_cli.steps.settings.embed import EmbedSettings


def data_command(folder: Path, sidecar: dict[str, Any] | None, **more: Any) -> str:
    """Return the command that replaces embeddings of data by ones of the same settings.

    Args:
        folder: Where they are.
        sidecar: Theirs; None for those of another tool, which are not replaced.
        more: Fields of `EmbedSettings` in which the new ones differ.
    """
    if sidecar is None:
        return shlex.join(["clipcid", "embed", "DATA", *_flags(more)])
    made = {name: sidecar["settings"][name] for name in ("keys", "fast_decode", "text")}
    settings = {"model": sidecar["model"]["spec"], **made, **recorded_augmentation(sidecar), **more}
    return shlex.join(["clipcid", "embed", "DATA", *_flags(settings | {"out": folder, "overwrite": True})])


def texts_command(model: str | None, **more: Any) -> str:
    """Return the command that embeds a file of texts.

    Args:
        model: The model; None where it is not known.
        more: Other fields of `EmbedSettings`.
    """
    return shlex.join(["clipcid", "embed", "--texts", "FILE", *_flags({"model": model or "MODEL"} | more)])


def _flags(settings: dict[str, Any]) -> list[str]:
    """Return the flags of the model and of what differs from its default."""
    defaults = {field.name: field.default for field in dataclasses.fields(EmbedSettings)} | {"model": None}
    flags = []
    for name, value in settings.items():
        flag = f"--{name.replace('_', '-')}"
        if value in (defaults[name], ("crop",)):  # the kind of views by default, as it is recorded
            continue
        if isinstance(value, bool):
            flags.append(flag if value else f"--no-{flag[2:]}")
        else:
            flags += [flag, ",".join(value) if isinstance(value, tuple) else str(value)]
    return flags
