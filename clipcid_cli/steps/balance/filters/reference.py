"""References, as a filter compares images with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.embeddings.folder import Embeddings, has_usable_row
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.formats.fingerprint import identity_of
from clipcid_cli.steps import reporting
from clipcid_cli.steps.embed.result import EmbedCost


@dataclasses.dataclass(frozen=True)
class NamedReference:
    """Images that others are compared with, by the flag and name that the user gave; a dry run does not embed them."""

    flag: str
    name: str
    rows: Embeddings | EmbedCost

    @property
    def num_rows(self) -> int:
        return self.rows.num_rows if isinstance(self.rows, Embeddings) else self.rows.images + self.rows.images_done


@dataclasses.dataclass(frozen=True)
class Reference:
    """One reference, by the name that the user gave, the hash of its files, and the rows that cannot be compared."""

    flag: str
    name: str
    identity: str
    embeddings: Embeddings
    bad_rows: npt.NDArray[np.int64]

    @cached_property
    def numbers(self) -> npt.NDArray[np.int64]:
        """Its usable rows, int64 [R], ascending."""
        return np.delete(np.arange(self.embeddings.num_rows), self.bad_rows)


def validate_usable(references: Sequence[NamedReference]) -> None:
    """Refuse references that nothing can be compared with."""
    for reference in references:
        rows = reference.rows
        if isinstance(rows, Embeddings) and not has_usable_row(rows.rows(Kind.IMAGES)):
            raise ClipcidError(
                f"All {rows.num_rows:,} rows of {reference.name} are zero or not finite.", "Embed again."
            )


def plan_references(references: Sequence[NamedReference]) -> list[Reference]:
    """Hash their files, and find the rows that cannot be compared."""
    return [_plan_reference(reference) for reference in references]


def _plan_reference(reference: NamedReference) -> Reference:
    name, embeddings = reference.name, reference.rows
    assert isinstance(embeddings, Embeddings), "this is no dry run"
    bad_rows = embeddings.find_bad_rows(texts=False)
    if len(bad_rows):
        reporting.warn(f"{len(bad_rows):,} rows of {name} are zero or not finite, and nothing is compared with them.")
    return Reference(reference.flag, name, identity_of({}, embeddings.fingerprints()), embeddings, bad_rows)
