"""The space in which features of student and teacher are compared, chosen by their widths and by stored embeddings."""

from __future__ import annotations

import dataclasses
from contextlib import suppress

import numpy as np
import numpy.typing as npt

from clipcid_cli.algorithms.losses.shared_space import PrincipalAxes, SharedSpace, principal_axes, second_moment
from clipcid_cli.formats.embeddings.folder import Embeddings
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.formats.files import atomic_file
from clipcid_cli.formats.fingerprint import identity_of
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.runtime.distributed import DistContext
from clipcid_cli.steps import reporting
from clipcid_cli.steps.distill.inputs import Inputs
from clipcid_cli.steps.settings.distill import DistillSettings

# Cut to the student's width only where that keeps at least this share of the teacher's squared length.
_ENOUGH_LENGTH = 0.98
# Principal axes are found from at most this many evenly spaced rows of each tower.
_AXES_ROWS = 2**20


def choose_space(inputs: Inputs, student_width: int, context: DistContext) -> SharedSpace:
    """Choose the space in which losses compare student and teacher; all processes take the first one's axes.

    For equal widths, and where no loss compares features of the two, it is the teacher's as it is, unless requested
    otherwise; else as requested, but ``pca`` cannot widen, or do without stored embeddings: ``project`` takes its place.
    """
    settings, teacher = inputs.settings, inputs.teacher
    teacher_width = teacher.width
    if teacher_width is None:
        return SharedSpace(student_width)
    embeddings = teacher.embeddings
    requested = settings.teacher_space
    if requested == "auto" and all(loss.space == "own" for loss in inputs.losses):
        return SharedSpace(teacher_width)
    if requested != "project" and student_width == teacher_width:
        return SharedSpace(teacher_width)
    by_layer = f"Shared space: the teacher's {teacher_width} dimensions, by a learned layer per student tower."
    if requested == "project" or student_width > teacher_width:
        reporting.note(by_layer)
    elif embeddings is None:
        reporting.note(
            f"{by_layer} There are no stored embeddings to find the axes of --teacher-space pca in (clipcid embed)."
        )
    else:
        axes = context.on_rank0(_find_axes, settings, embeddings, student_width)
        dimensions = f"{student_width} of the teacher's {teacher_width} dimensions"
        if requested == "pca" or axes.kept >= _ENOUGH_LENGTH:
            reporting.note(f"Shared space: {dimensions}, which keep {axes.kept:.1%} of its rows' squared length.")
            basis = axes.basis_Dd.to(context.device)
            return SharedSpace(student_width, dataclasses.replace(axes, basis_Dd=basis))
        reporting.note(
            f"{dimensions} keep only {axes.kept:.1%} of its rows' squared length, so a learned layer per student "
            "tower maps to all of them (--teacher-space pca cuts anyway)."
        )
    return SharedSpace(teacher_width, is_learned=True)


def _find_axes(settings: DistillSettings, embeddings: Embeddings, width: int) -> PrincipalAxes:
    return principal_axes(_find_second_moment(settings, embeddings), width)


def _find_second_moment(settings: DistillSettings, embeddings: Embeddings) -> npt.NDArray[np.float64]:
    """Read the second moment of the teacher's rows that an earlier start kept; compute and keep it where there is none."""
    identity = identity_of({"axes_rows": _AXES_ROWS}, embeddings.fingerprints([Kind.TEXTS]))
    path = WorkDirectory(settings.work).second_moment(identity)
    with suppress(OSError, ValueError, EOFError):
        kept: npt.NDArray[np.float64] = np.load(path, allow_pickle=False)
        return kept
    sides = [embeddings.rows(kind) for kind in (Kind.IMAGES, Kind.TEXTS) if kind in embeddings.kinds]
    stride = -(-embeddings.num_rows // _AXES_ROWS)
    # Rows of another tool that are not finite are left out of training, and here.
    blocks = (np.nan_to_num(block, posinf=0, neginf=0) for side in sides for _, block in side.blocks(stride=stride))
    moment = second_moment(blocks, embeddings.width)
    if not settings.dry_run:
        with atomic_file(path, shared=True) as file:  # two runs may keep it at once
            np.save(file, moment, allow_pickle=False)
    return moment
