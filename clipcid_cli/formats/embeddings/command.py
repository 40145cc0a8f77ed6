"""The command that makes embeddings as they are, or with more beside them: for the fix of an error."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import msgspec

from clipcid_cli.errors import command_line
from clipcid_cli.formats.data.samples import Columns
from clipcid_cli.formats.sidecar import DataSpec, EmbedMade, EmbedSidecar
from clipcid_cli.shown import redact

# What a command of `embed` omits.
DEFAULTS = {
    "text": True,
    "keys": "sample",
    "fast_decode": False,
    **{field.name: field.default for field in msgspec.structs.fields(EmbedMade) if not field.required},
    **{f"{name}_column": value for name, value in dataclasses.asdict(Columns()).items()},
}


def data_command(folder: Path, sidecar: EmbedSidecar | None, data: str | None = None, **more: Any) -> str:
    """Return the command that replaces embeddings by ones of the same settings, but for the flags `more`.

    Args:
        sidecar: Theirs; None for those of another tool, which are not replaced.
        data: The data; None for what the sidecar records.
    """
    if sidecar is None:
        return embed_command(**{"model": "MODEL", "described": None, "data": data, **more})
    recorded = (*DEFAULTS, "precision", "batch_size")
    recorded_settings = {name: sidecar.settings[name] for name in recorded if name in sidecar.settings}
    settings = {"model": sidecar.model.spec} | recorded_settings | _flags_of_data(sidecar.data, data, more)
    replaced = _differing(settings) | {"out": folder, "overwrite": True}
    return command_line("embed", data or sidecar.data.spec, **replaced)


def embed_command(model: str, described: DataSpec | None, data: str | None, **flags: Any) -> str:
    """Return the command that embeds data, or else the data that embeddings record, with another model."""
    named = data or ("DATA" if described is None else described.spec)
    return command_line("embed", named, model=model, **_differing(_flags_of_data(described, data, flags)))


def reading_flags(described: DataSpec) -> dict[str, Any]:
    """Return the flags by which recorded data was read."""
    return _differing(_flags_of_data(described, None, {}))


def remake(folder: Path, sidecar: EmbedSidecar) -> str:
    """Return the fix of a finished folder whose files are not those that were written."""
    copy = "Or copy the rows to another folder, without embed.json, and name that one."
    return f"Run: {data_command(folder, sidecar)}\n{copy}"


def texts_command(model: str | None, texts: str | None = None, **more: Any) -> str:
    """Return the command that embeds a file of texts with a model; None stands for what is not known."""
    return command_line("embed", texts=texts or "FILE", model=model or "MODEL", **more)


def _flags_of_data(described: DataSpec | None, data: str | None, flags: dict[str, Any]) -> dict[str, Any]:
    """Return flags and those by which the recorded data was read, where that is the data of the command."""
    if described is None or (data is not None and redact(data) != described.spec):
        return flags
    recorded = {f"{name}_column": getattr(described, name) for name in dataclasses.asdict(Columns())}
    recorded |= {name: getattr(described, name) for name in ("keys", "caption_lines", "caption_key")}
    recorded |= {name: getattr(described, name) for name in ("list_root", "list_separator", "list_encoding")}
    return flags | recorded if data is None else recorded | flags


def _differing(settings: dict[str, Any]) -> dict[str, Any]:
    listed = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
    differing = {name: value for name, value in listed.items() if name not in DEFAULTS or value != DEFAULTS[name]}
    return differing | ({"view_kind": ",".join(differing["view_kind"])} if "view_kind" in differing else {})
