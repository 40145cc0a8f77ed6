"""Put an export that passed its check on the Hugging Face hub, with its card."""

from __future__ import annotations

from pathlib import Path

from clipcid_cli import __version__
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.fingerprint import validate_unchanged
from clipcid_cli.formats.models.export_sidecar import ExportSidecar
from clipcid_cli.formats.sidecar import sidecar_path
from clipcid_cli.runtime.models.hub import find_uploader, upload
from clipcid_cli.steps import reporting


def validate_push(repository: str) -> None:
    """Refuse, before anything is exported, what the hub would not take from this machine."""
    reporting.note(f"Files will be pushed to {repository} as {find_uploader(repository)}.")


def push(folder: Path, sidecar: ExportSidecar, repository: str) -> str:
    """Upload the files of an export, which must be those that were compared; return the address of the commit."""
    validate_unchanged(
        folder,
        sidecar.outputs,
        sidecar_path(folder, "export"),
        "Export again, to another --out or with --overwrite; only the model card may be edited.",
    )
    inside = folder.resolve()
    for name in sidecar.written:
        # The folder may come from elsewhere, and its sidecar or a link there may name any file of this machine.
        if not (folder / name).resolve().is_relative_to(inside):
            raise ClipcidError(
                f"--push {repository}: {name} of {folder} is outside of that folder.", "Export again, to another --out."
            )
    reporting.note(f"Pushing {len(sidecar.written)} files to {repository} …")
    return upload(repository, folder, sidecar.written, f"Export of clipcid {__version__}")
