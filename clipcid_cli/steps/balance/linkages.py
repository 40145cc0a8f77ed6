"""The linkages: how images are divided into sets, and what the rest of `balance` must know of each way.

Another linkage is a module with its function `divide`, an entry here, and its name in `steps/settings/balance.py`.
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a run loads the modules of its own linkage alone
    from clipcid_cli.steps.balance.balance_run import BalanceRun
    from clipcid_cli.steps.balance.compared_linkage import ComparedLinkage
    from clipcid_cli.steps.balance.pairs import NotComputed
    from clipcid_cli.steps.balance.sets import Division
    from clipcid_cli.steps.balance.stored_forest import Forest


@dataclasses.dataclass(frozen=True)
class Linkage:
    """One way to divide images into sets."""

    # ``module:function`` in this folder; called as `divide` says.
    divided_by: str
    # The linkage that a run and its report compare it with, and the ``module:function`` that computes that one.
    compared_with: str
    compared_by: str
    # What its sets are, in the report.
    explanation: str
    # Why fewer images may be kept than asked for: the start of a sentence, with a place for the cut-off.
    why_fewer: str
    # How many rows must have a neighbour within the first search for each that is to be dropped; None where every edge of
    # the forest drops one.
    rows_near: float | None = None
    # Whether each edge of the forest within the cut-off joins its two rows, so that its curve is known at every distance.
    follows_forest: bool = False
    # Which edges of the forest within the cut-off join their rows, in the report; for those that do not follow the forest.
    which_join: str = ""
    # Whether an image can be farther than the cut-off from the one kept of its set.
    may_chain: bool = False

    def divide(self, run: BalanceRun, forest: Forest, threshold: float, num_kept: int) -> tuple[Division, Forest]:
        """Divide the searched rows into sets; the same on every process.

        Args:
            forest: It is complete up to `threshold`.
            threshold: The cut-off that was given; else that at which single linkage keeps `num_kept` rows at most.
            num_kept: How many rows are to be kept; all of them where the cut-off was given.

        Returns:
            The sets, and the forest, which another one has replaced where the sets took a larger distance.
        """
        division: tuple[Division, Forest] = _load(self.divided_by)(run, forest, threshold, num_kept)
        return division

    def compare(self, run: BalanceRun, forest: Forest, threshold: float) -> ComparedLinkage | NotComputed:
        """Compute what the linkage that it is compared with keeps at the cut-off; the same on every process."""
        compared: ComparedLinkage | NotComputed = _load(self.compared_by)(run, forest, threshold)
        return compared


def _load(name: str) -> Any:
    module, function = name.split(":")  # of the table below: a user's word is looked up there
    return getattr(importlib.import_module(f"clipcid_cli.steps.balance.{module}"), function)


LINKAGES = {
    "single": Linkage(
        divided_by="sets:divide_by_components",
        compared_with="star",
        compared_by="compared_linkage:compare_stars",
        explanation="chains of near images form one set, and its central image is kept; an image at the end of a chain may "
        "be farther than ε from it.",
        why_fewer="Pairs tie at the cut-off {:.6g}, and all of them merge",
        follows_forest=True,
        may_chain=True,
    ),
    "star": Linkage(
        divided_by="stars:divide_by_stars",
        compared_with="single",
        compared_by="compared_linkage:compare_single",
        explanation="every dropped image is within ε of its kept image.",
        why_fewer="With stars one more pair may drop several images, as at the cut-off {:.6g}",
        # Stars drop fewer rows than there are edges: 1.40 to 1.76 where up to 0.44 of all rows are dropped; where 0.7 are,
        # 0.90 to 0.94 of all rows must have a near neighbour (measured).
        rows_near=1.8,
        which_join="Of the pairs inside, a star joins those of which one image is kept and represents the other.",
    ),
}
