"""What `balance` reads: its embeddings and those of references, which are made where there are none, by all processes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clipcid_cli.formats.embeddings.folder import Embeddings
from clipcid_cli.formats.files import validate_writable
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.runtime.distributed import DistContext
from clipcid_cli.runtime.timing import timed
from clipcid_cli.steps import reporting
from clipcid_cli.steps.balance.filters import make_filters
from clipcid_cli.steps.balance.plan import BalanceInputs
from clipcid_cli.steps.embeddings import open_given
from clipcid_cli.steps.settings.balance import BalanceSettings
from clipcid_cli.steps.settings.embed import DEFAULT_MODEL, configured

if TYPE_CHECKING:
    from clipcid_cli.steps.balance.filters.filter import Filter
    from clipcid_cli.steps.balance.filters.reference import NamedReference
    from clipcid_cli.steps.embed.result import EmbedCost


@dataclasses.dataclass(frozen=True)
class _Choice:
    """The embeddings to balance: a folder, or the model that makes them; and the filters."""

    folder: Path | None
    model: str | None
    filters: Sequence[Filter]


def prepare(settings: BalanceSettings, context: DistContext) -> BalanceInputs | EmbedCost:
    """Look at what the settings name, before hours of embedding; then make what embeddings there are none of.

    A dry run makes none, and returns what they would cost.
    """
    seconds = dict[str, float]()
    with timed(seconds, "embed"):
        choice = context.on_rank0(_choose, settings)
        folder = _embed(settings, choice.model, context) if choice.folder is None else choice.folder
        if not isinstance(folder, Path):
            return folder
        embeddings = open_given(settings, folder, None if settings.dry_run else settings.work)
        references = _open_references(settings, embeddings, context)
    return BalanceInputs(embeddings, references, choice.filters, seconds)


def _choose(settings: BalanceSettings) -> _Choice:
    """Choose embeddings and filters, and refuse what cannot be compared or written in the end."""
    for path in (settings.write_uids, settings.write_pairs, settings.write_keys):
        if path is not None:
            validate_writable(path)
    if settings.writes_samples:
        from clipcid_cli.steps.balance.write_data import validate_target

        validate_target(settings)
    filters = make_filters(settings)
    work = WorkDirectory(settings.work)
    folder = settings.embeddings
    model = None
    if folder is None and settings.data is None and settings.model is None:
        folder = work.find_embeddings()
    elif folder is None:
        model = settings.model or _choose_model(work)
    if settings.named_references:
        from clipcid_cli.steps.balance.filters.references import validate_references

        validate_references(settings, model)
    if folder is not None and settings.embeddings is None:
        reporting.note(f"Embeddings: {folder}.")
    return _Choice(folder, model, filters)


def _choose_model(work: WorkDirectory) -> str:
    """Choose the model that has embedded before, or else the one of the configuration."""
    from clipcid_cli.steps.models import find_embedded_model

    model: str = find_embedded_model(work) or configured().get("model", DEFAULT_MODEL)
    return model


def _embed(settings: BalanceSettings, model: str | None, context: DistContext) -> Path | EmbedCost:
    # And with it the models, which existing embeddings need none of.
    from clipcid_cli.steps.embed.request import ensure_embeddings

    assert model is not None, "one is chosen where no folder is"
    return ensure_embeddings(settings, context, data=settings.data, model=model)


def _open_references(settings: BalanceSettings, embeddings: Embeddings, context: DistContext) -> list[NamedReference]:
    if not settings.named_references:
        return []
    from clipcid_cli.steps.balance.filters.reference import NamedReference
    from clipcid_cli.steps.balance.filters.references import open_reference

    return [
        NamedReference(flag, name, open_reference(settings, embeddings, flag, name, context))
        for flag, name in settings.named_references
    ]
