"""Which keep list a command takes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.steps import reporting

if TYPE_CHECKING:
    from clipcid_cli.steps.chosen_keep_list import ChosenKeepList

NO_KEEP_LIST = "none"


def choose_keep_list(
    option: str | None, work: WorkDirectory, samples: str, max_missing: float
) -> ChosenKeepList | None:
    """Choose the keep list of a step; None where all samples are to be used, which is reported.

    `option` is the value of ``--keep-list``: a file, ``none``, or None for the work directory's list where there is one.
    """
    path = work.find_keep_list() if option is None else Path(option)
    if path is None or option == NO_KEEP_LIST:
        reporting.note(f"Keep list: none, all {samples} are used.")
        return None
    from clipcid_cli.steps.chosen_keep_list import ChosenKeepList

    return ChosenKeepList.read(path, samples, max_missing)
