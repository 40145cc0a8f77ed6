"""A folder for what a dry run makes on its way: a run keeps it in the work directory, which a dry run leaves as it is."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from clipcid_cli.errors import ClipcidError
from clipcid_cli.runtime.machine import Machine


@contextmanager
def scratch_folder(machine: Machine, *, dry_run: bool) -> Iterator[Path | None]:
    """Make the folder in which a dry run keeps what a run keeps in the work directory; None for a run."""
    if not dry_run:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="clipcid-") if machine.is_main else nullcontext("") as own:
        folder = Path(machine.broadcast(own))
        machine.on_all(lambda: _require_folder(folder))
        yield folder
        machine.barrier()


def _require_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ClipcidError(
            f"--dry-run keeps temporary files in {folder}, which not every host has.",
            "Set TMPDIR to a folder that all hosts share, or run it on one host.",
        )
