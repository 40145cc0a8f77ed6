"""What is sent to a worker of a batch: which samples, and which views of them and further texts to show."""

from __future__ import annotations

import dataclasses

from clipcid_cli.formats.data.index import SampleRef
from clipcid_cli.steps.distill.augmented.extra_texts import ExtraText
from clipcid_cli.steps.distill.augmented.views import StoredView


@dataclasses.dataclass(frozen=True)
class Item:
    """One sample of a batch, as it is sent to a worker.

    Attributes:
        epoch: The pass over the data; its view and caption are drawn anew in each.
        view: The stored view to show; None draws one.
        whole: Whether the image is shown whole, as none of its stored views can be.
    """

    row: int
    epoch: int
    sample: SampleRef
    view: StoredView | None = None
    whole: bool = False


@dataclasses.dataclass(frozen=True)
class BatchShare:
    """One process's part of a batch, and of its further texts, as it is sent to a worker."""

    items: list[Item]
    extra_texts: list[ExtraText] = dataclasses.field(default_factory=list)
