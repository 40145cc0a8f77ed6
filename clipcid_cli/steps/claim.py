"""Claiming an output folder from any number of processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from clipcid_cli.formats.output import WORK_OR_OUT, Output, open_output
from clipcid_cli.runtime.machine import Machine


@contextmanager
def claim_output(
    machine: Machine,
    folder: Path,
    step: str,
    *,
    settings: dict[str, Any],
    inputs: list[dict[str, Any]],
    overwrite: bool,
    replaceable: frozenset[str] = frozenset(),
    clear: Callable[[], None] = lambda: None,
    resumable: bool = True,
    may_grow: bool = False,
    keeps_earlier: bool = False,
    elsewhere: str = WORK_OR_OUT,
) -> Iterator[Output]:
    """Lock `folder` on the first process and give its state to all processes.

    The arguments are those of `open_output`. Only the first process may call ``drop_earlier`` and ``commit`` of the result.

    Raises:
        ClipcidError: on every process, when another run holds the folder or it holds an output of other settings.
    """
    with ExitStack() as stack:

        def claim() -> Output:
            return stack.enter_context(
                open_output(
                    folder,
                    step,
                    settings=settings,
                    inputs=inputs,
                    overwrite=overwrite,
                    replaceable=replaceable,
                    clear=clear,
                    resumable=resumable,
                    may_grow=may_grow,
                    keeps_earlier=keeps_earlier,
                    elsewhere=elsewhere,
                )
            )

        output = machine.on_main(claim)
        yield output
        machine.barrier()
