"""The linkages: how images are divided into sets, and what the rest of `balance` must know of each way.

Another covering linkage is a function as `star_cover` in `algorithms/sets/`, and an entry here. Any other one has also a
function of its own, `divided_by`, in a module of this folder. `steps/settings/balance.py` reads names and help from here, so
this module imports no other one at run time.
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a run loads the modules of its own linkage alone
    from clipcid_cli.algorithms.sets.covers import CoverRows
    from clipcid_cli.steps.balance.balance_run import BalanceRun
    from clipcid_cli.steps.balance.compared_linkage import ComparedLinkage
    from clipcid_cli.steps.balance.pairs import NotComputed
    from clipcid_cli.steps.balance.sets import Division
    from clipcid_cli.steps.balance.stored_forest import Forest


_HERE = "clipcid_cli.steps.balance"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linkage:
    """One way to divide images into sets."""

    # What the linkage does, for ``--help``.
    help: str
    # Whether it itself determines the kept image of each set, so that ``--select`` is refused.
    chooses: bool
    # Its place in the palette of figures, whose last colour is that of the cut-off.
    color: int
    # ``module:function`` in this folder; called as `divide` says.
    divided_by: str
    # The linkage that a run and its report compare it with, and the ``module:function`` that computes that one.
    compared_with: str
    compared_by: str
    # What its sets are, in the report.
    explanation: str
    # Why fewer images may be kept than asked for: the start of a sentence, with a place for the cut-off.
    why_fewer: str
    # ``module:function`` of `algorithms/sets/` that covers the rows, for `covers:divide`; empty where nothing is covered.
    covered_by: str = ""
    # How many rows are dropped, at least, for each that has a neighbour within the cut-off: by it the first search goes as
    # far as a share to keep needs. None where every edge of the forest drops a row.
    drops_per_near_row: float | None = None
    # Whether each edge of the forest within the cut-off joins its two rows, so that its curve is known at every distance.
    follows_forest: bool = False
    # Which edges of the forest within the cut-off join their rows, in the report; for those that do not follow the forest.
    which_join: str = ""
    # Whether an image can be farther than the cut-off from the one kept of its set.
    may_chain: bool = False

    def divide(
        self, run: BalanceRun, forest: Forest, threshold: float, num_kept: int | None
    ) -> tuple[Division, Forest]:
        """Divide the searched rows into sets; the same on every process.

        Args:
            forest: It is complete up to `threshold`.
            threshold: The cut-off that was given; else that at which single linkage keeps `num_kept` rows at most.
            num_kept: How many rows are to be kept; None where the cut-off was given.

        Returns:
            The sets, and the forest, which another one has replaced where the sets took a larger distance.
        """
        division: tuple[Division, Forest] = _load(_HERE, self.divided_by)(run, forest, threshold, num_kept)
        return division

    def compare(self, run: BalanceRun, forest: Forest, threshold: float) -> ComparedLinkage | NotComputed:
        """Compute what the linkage that it is compared with keeps at the cut-off; the same on every process."""
        compared: ComparedLinkage | NotComputed = _load(_HERE, self.compared_by)(run, forest, threshold)
        return compared

    def load_cover(self) -> CoverRows:
        """Return what covers the rows, of a covering linkage."""
        cover: CoverRows = _load("clipcid_cli.algorithms.sets", self.covered_by)
        return cover


def _load(folder: str, name: str) -> Any:
    module, function = name.split(":")  # of the table below: a user's word is looked up there
    return getattr(importlib.import_module(f"{folder}.{module}"), function)


LINKAGES = {
    "single": Linkage(
        help="a chain of near-duplicates is one set, as in the CLIP-CID paper.",
        chooses=False,
        color=0,
        divided_by="sets:divide_by_components",
        compared_with="star",
        compared_by="compared_linkage:compare_cover",
        explanation="chains of near images form one set, and its central image is kept; an image at the end of a chain may "
        "be farther than ε from it.",
        why_fewer="Pairs tie at the cut-off {:.6g}, and all of them merge",
        follows_forest=True,
        may_chain=True,
    ),
    "star": Linkage(
        help="every dropped image is within the cut-off of its kept image.",
        chooses=True,
        color=1,
        divided_by="covers:divide",
        covered_by="star:star_cover",
        compared_with="single",
        compared_by="compared_linkage:compare_single",
        explanation="every dropped image is within ε of its kept image.",
        why_fewer="With stars one more pair may drop several images, as at the cut-off {:.6g}",
        # For each dropped row 1.40 to 1.76 have a near neighbour where up to 0.44 of all rows are dropped; where 0.7 are,
        # 0.90 to 0.94 of all rows have one (measured).
        drops_per_near_row=1 / 1.8,
        which_join="Of the pairs inside, a star joins those of which one image is kept and represents the other.",
    ),
}
