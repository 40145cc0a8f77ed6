"""Sidecars: ``<step>.json`` beside an output, as types, with a checksum: one that was edited is refused where it is read.

Entries that steps look into are attributes. Settings, counts and results, which are compared or given back as they are,
stay JSON values. Entries that a type does not name are ignored.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from clipcid_cli import __version__
from clipcid_cli.errors import ClipcidError, flag_words
from clipcid_cli.formats.files import read_regular, reading, write_json
from clipcid_cli.formats.fingerprint import FileRecord
from clipcid_cli.shown import redact_all
from clipcid_cli.typed import made_by, this_command

FORMAT_VERSION = 2
LARGEST_SIDECAR = 2**30
"""Bytes of a sidecar: one that lists a million shards has 300 MB."""

AnySidecar = TypeVar("AnySidecar", bound="Sidecar")


class Provenance(msgspec.Struct, kw_only=True):
    """What decides an output: the settings, as JSON values, and the contents of the inputs."""

    settings: dict[str, Any]
    inputs: list[FileRecord]


class Sidecar(Provenance, kw_only=True):
    """What every sidecar holds."""

    format_version: int
    tool: str
    tool_version: str
    step: str
    outputs: list[FileRecord] = []  # the files that it stands for, relative to its folder
    counts: dict[str, Any]  # numbers of samples or rows read, used and skipped by reason
    seconds: dict[str, int | float]  # time by phase
    command: list[str] = []  # the command as typed, word by word; empty where a step was called from Python

    def records(self, folder: Path) -> list[FileRecord]:
        """Return what is recorded of the files, whose paths are relative to the sidecar's `folder`."""
        return self.outputs

    def files(self, folder: Path) -> set[str]:
        """Return the paths of the files; `Output.place` removes those that the output after this one lacks."""
        return {file.path for file in self.records(folder)}


class DataSpec(msgspec.Struct, omit_defaults=True):
    """What opens data again: its name, and the flags by which it was read."""

    spec: str
    keys: str
    image: str
    caption: str
    key: str
    caption_lines: bool = False
    caption_key: tuple[str, ...] = ()
    list_root: str | None = None
    list_separator: str | None = None
    list_encoding: str | None = None


def sidecar_path(folder: Path, step: str) -> Path:
    """Return the path of the sidecar of a step's output."""
    return folder / f"{step}.json"


def read_sidecar(path: Path, kind: type[AnySidecar], fix: str | None = None) -> AnySidecar | None:
    """Read a sidecar; None when there is none. `fix` says what to do about one that is damaged, or of an earlier version."""
    if not path.exists():
        return None
    with reading(path, "a sidecar of clipcid", fix or "Remove it, or choose another folder."):
        content = json.loads(
            read_regular(path, LARGEST_SIDECAR)
        )  # msgspec's own parser refuses names of files that are not UTF-8
        version = msgspec.convert(content["format_version"], int)
        if version < FORMAT_VERSION:
            raise ClipcidError(
                f"{path} was written by an earlier clipcid, in format version {version}; this one has {FORMAT_VERSION}.",
                fix or "Run its command again with --overwrite.",
            )
        if version > FORMAT_VERSION:
            raise ClipcidError(
                f"{path} has format version {version}; this clipcid {__version__} knows up to {FORMAT_VERSION}.",
                "Upgrade clipcid, or choose another folder.",
            )
        if content.get("checksum") != seal(content)["checksum"]:
            raise ValueError("it was edited, or is damaged")
        return msgspec.convert(content, kind)


def run_again(step: str, sidecar: Sidecar | None, or_else: str = "", **flags: Any) -> str:
    """Return the fix that makes an output anew: the flags to add to its command, which is shown as it was typed.

    `or_else` is another remedy, a line.
    """
    again = f"Run {step} again with {flag_words(**flags, overwrite=True)}."
    command = [] if sidecar is None else sidecar.command
    return "\n".join(filter(None, [again, or_else, made_by("The output that is there was", command)]))


def write_sidecar(path: Path, sidecar: Sidecar) -> None:
    """Write a sidecar with its checksum."""
    write_json(path, seal(msgspec.to_builtins(sidecar)))


def seal(content: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of a sidecar with the checksum that belongs to them."""
    plain = {name: value for name, value in content.items() if name != "checksum"}
    digest = hashlib.blake2b(json.dumps(plain, sort_keys=True).encode(), digest_size=16)
    return plain | {"checksum": f"blake2b:{digest.hexdigest()}"}


def make_sidecar(kind: type[AnySidecar], step: str, run: Provenance, entries: dict[str, Any]) -> AnySidecar:
    """Return the sidecar of a run, as `read_sidecar` will."""
    content = {"format_version": FORMAT_VERSION, "tool": "clipcid", "tool_version": __version__, "step": step}
    seconds = {phase: round(value, 3) for phase, value in entries["seconds"].items()}
    content |= {"settings": run.settings, "inputs": run.inputs, **entries, "seconds": seconds}
    content["command"] = this_command()
    assert content.keys() <= {*kind.__struct_encode_fields__}, content.keys() - {*kind.__struct_encode_fields__}
    plain = msgspec.to_builtins(content, enc_hook=lambda number: number.item())  # NumPy's numbers
    return msgspec.convert(redact_all(plain), kind)
