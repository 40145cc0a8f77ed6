"""Where a step writes, told to all its processes: the output that it claims, or the scratch folder of a dry run."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.output import Output, OutputSpec, find_output, list_differences, open_output
from clipcid_cli.formats.sidecar import AnySidecar
from clipcid_cli.runtime.distributed import DistContext
from clipcid_cli.steps import reporting


@contextmanager
def claim_output(context: DistContext, spec: OutputSpec[AnySidecar]) -> Iterator[Output[AnySidecar]]:
    """Lock an output on the first process and give its state to all; the first alone may call `begin_work` and `commit`."""
    with ExitStack() as stack:
        yield context.on_rank0(stack.enter_context, open_output(spec))
        context.barrier()


def preview_output(spec: OutputSpec[AnySidecar], what: str, follows: str) -> None:
    """Say, in a dry run, that an output is there, would be resumed or replaced; refuse one that a run would refuse.

    Args:
        what: What the folder holds: ``this run``.
        follows: What the dry run says next, as a sentence.
    """
    output = find_output(spec)
    if output.finished is not None:
        reporting.note(f"{spec.folder} holds {what} already, finished. {follows}")
    elif output.begun is not None:
        reporting.note(f"{spec.folder} holds {what} unfinished, which a run resumes. {follows}")
    elif output.differences:
        differences = list_differences(output.differences)
        reporting.note(f"{spec.folder} holds a result of other settings or inputs, which is replaced:\n{differences}")


@contextmanager
def scratch_folder(context: DistContext, *, dry_run: bool) -> Iterator[Path | None]:
    """Make a folder for what a run keeps in the work directory, which a dry run leaves as it is; None for a run."""
    if not dry_run:
        yield None
        return

    def require(folder: Path) -> None:
        if not folder.is_dir():
            raise ClipcidError(
                f"--dry-run keeps temporary files in {folder}, which not every host has.",
                "Set TMPDIR to a folder that all hosts share, or run it on one host.",
            )

    with tempfile.TemporaryDirectory(prefix="clipcid-") if context.is_main else nullcontext("") as own:
        folder = Path(context.broadcast(own))
        context.on_all(require, folder)
        yield folder
        context.barrier()
