"""What every filter has: `Filter`, as the settings ask for it, and `Dropped`, once it has looked at the images."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import msgspec

from clipcid_cli.algorithms.near.exact import BoolArray, IntArray
from clipcid_cli.formats.results.keep_list import Column
from clipcid_cli.steps.balance.balance_run import BalanceRun
from clipcid_cli.steps.balance.filters.reference import Reference
from clipcid_cli.steps.balance.pictures import ReportPictures
from clipcid_cli.steps.balance.plan import BalanceInputs
from clipcid_cli.steps.settings.balance import BalanceSettings

SAMPLED = 8192
"""Images that a dry run looks at: all of them where they are no more."""


@dataclasses.dataclass(frozen=True)
class FilterCost:
    """What a filter adds to what a dry run counts."""

    fields: dict[str, Any]  # of `BalanceCost`
    searched: int  # images that it leaves to be searched
    mapped_rows: int = 0  # rows that are read beside those of the images and of references
    bytes_an_image: int = 0  # written beside the nearest references
    note: str = ""  # said after all that is counted


@dataclasses.dataclass(frozen=True)
class Filter(ABC):
    """A reason to drop images, as the settings ask for it; picklable, as the plan is."""

    follows_search: ClassVar[bool] = False  # whether it drops some of the images that repeats have left
    settings: BalanceSettings

    def identify(self, references: Sequence[Reference]) -> dict[str, Any]:
        """Name what it reads as it decides the output, beside its settings."""
        return {}

    @abstractmethod
    def estimate(self, inputs: BalanceInputs, sample: IntArray, searched: int) -> FilterCost:
        """Count what it takes, from some rows of the embeddings, where earlier filters leave so many images."""

    def find_risk(self, searched: int) -> str:
        """Say, once it is known how many images are searched, what may make the run fail in the end; empty if nothing."""
        return ""

    @abstractmethod
    def apply(self, run: BalanceRun, is_left: BoolArray) -> Dropped:
        """Find, on all processes, which of the images that are left, bool [N], it drops; the same on each."""


@dataclasses.dataclass(frozen=True)
class Dropped(ABC):
    """Which images a filter drops, and what keep list, JSON object and report say of them."""

    name: ClassVar[str]  # of its field of `BalanceResult`, and of its section of the report: ``balance_<name>.html``
    reason: ClassVar[str]  # in the keep list
    words: ClassVar[str]  # which images it drops, in the report
    is_dropped: BoolArray  # bool [N]; images that an earlier filter drops may be among them

    @property
    def searches(self) -> frozenset[str]:
        """The names of saved comparisons that a later run may need."""
        return frozenset()

    @abstractmethod
    def summarise(self) -> msgspec.Struct:
        """Count, for the JSON object, what it drops."""

    @abstractmethod
    def columns(self, folder: Path) -> list[Column]:
        """Return the columns that it adds to the keep list; what is more than memory holds is mapped in a folder."""

    @abstractmethod
    def show(self, run: BalanceRun, pictures: ReportPictures) -> Any:
        """Return what its section of the report shows beside the counts."""
