"""The space in which features of student and teacher are compared, whatever their widths, and what the losses learn.

Shape legend: D teacher width, d student width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipcid_cli.algorithms.losses.registry import LossEntry


@dataclasses.dataclass(frozen=True)
class PrincipalAxes:
    """The first d principal axes of the teacher's rows."""

    basis_Dd: Tensor  # orthonormal columns, float32
    kept: float  # share of the rows' squared length that lies in them, in [0, 1]


def second_moment(blocks: Iterable[npt.NDArray[Any]], width: int) -> npt.NDArray[np.float64]:
    """Sum xᵀx over the rows x of some blocks, float [n, D] each; float64 [D, D]."""
    total = np.zeros((width, width))
    for block in blocks:
        rows = block.astype(np.float64)
        total += rows.T @ rows
    return total


def principal_axes(moment_DD: npt.NDArray[np.float64], width: int) -> PrincipalAxes:
    """Find the d axes that keep most of the rows' squared length, the strongest first.

    The mean is not subtracted: a rotation about the origin keeps every dot product, and so every cosine similarity up to
    what is cut, which subtracting a mean would not. Each axis has its largest entry positive, whatever the solver chose.

    Source: docs/method.md#shared-space.
    """
    values, vectors = np.linalg.eigh(moment_DD)
    axes = vectors[:, ::-1][:, :width]
    largest = np.abs(axes).argmax(axis=0)
    axes = axes * np.sign(axes[largest, np.arange(axes.shape[1])])
    kept = float(values[::-1][:width].sum() / values.sum())
    return PrincipalAxes(torch.from_numpy(axes.astype(np.float32)), kept)


def project(rows_nD: Tensor, axes: PrincipalAxes | None) -> Tensor:
    """Project rows of the teacher's space on the shared one, and normalise them (float16 rows are unit only to 1e-3)."""
    if axes is not None:
        rows_nD = rows_nD @ axes.basis_Dd
    return F.normalize(rows_nD, dim=1)


@dataclasses.dataclass(frozen=True)
class SharedSpace:
    """Where features of student and teacher are compared: the teacher's space, or its first principal axes."""

    width: int
    # What the teacher's rows are projected on; None where its space is taken as it is.
    axes: PrincipalAxes | None = None
    is_learned: bool = False  # whether the student's features go through a learned layer per tower


class LossParameters(nn.Module):
    """The parameters of a run's losses, as `LossEntry` declares them.

    `log_scales` are logarithms. `image_map` and `text_map` lead from the student's features into the shared space, d → D;
    None where that is not learned.
    """

    def __init__(self, entries: Collection[LossEntry], student_width: int, space: SharedSpace, seed: int) -> None:
        """Make the parameters that some losses learn; the seed decides the layers' first weights."""
        super().__init__()
        self.log_scales = nn.ParameterDict(
            {entry.name: torch.tensor(math.log(entry.scale)) for entry in entries if entry.scale is not None}
        )
        self.image_map: nn.Linear | None = None
        self.text_map: nn.Linear | None = None
        self.fusions = nn.ModuleDict()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if space.is_learned:
                self.image_map = nn.Linear(student_width, space.width)
                self.text_map = nn.Linear(student_width, space.width)
            for entry in entries:
                if entry.fuses:
                    widths = student_width + space.width, student_width
                    self.fusions[entry.name] = nn.ModuleList([nn.Linear(*widths), nn.Linear(*widths)])

    def of(self, name: str) -> dict[str, Any]:
        """Return the arguments that a loss is called with beside its batch."""
        scales: dict[str, Any] = {"scale": self.log_scales[name].exp()} if name in self.log_scales else {}
        return scales | ({"fusion": self.fusions[name]} if name in self.fusions else {})
