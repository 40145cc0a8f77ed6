"""Claiming an output from any number of processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from clipcid_cli.formats.output import Output, open_output
from clipcid_cli.formats.sidecar import AnySidecar
from clipcid_cli.runtime.machine import Machine


@contextmanager
def claim_output(
    machine: Machine, folder: Path, step: str, kind: type[AnySidecar], **wanted: Any
) -> Iterator[Output[AnySidecar]]:
    """Lock an output on the first process and give its state to all processes.

    The arguments are those of `find_output`. Only the first process may call ``start`` and ``commit`` of the result.
    """
    with ExitStack() as stack:
        yield machine.on_main(lambda: stack.enter_context(open_output(folder, step, kind, **wanted)))
        machine.barrier()
