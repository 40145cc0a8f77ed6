"""The plan of `balance`, which the first process makes: what is balanced, and what decides the result."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from clipcid_cli.errors import ClipcidError, flag_words
from clipcid_cli.formats.data.dataset import Dataset, list_shards
from clipcid_cli.formats.embeddings.folder import Embeddings
from clipcid_cli.formats.embeddings.kinds import METADATA, Kind
from clipcid_cli.formats.fingerprint import find_lost
from clipcid_cli.formats.output import WORK, OutputSpec, find_works, other_run_error
from clipcid_cli.formats.results.forest import ROW_NUMBERING, NumberedFile, read_row_numbering
from clipcid_cli.formats.results.keep_list import BalanceSidecar
from clipcid_cli.formats.work_directory import KEEP_LIST, WorkDirectory
from clipcid_cli.steps import reporting
from clipcid_cli.steps.balance.filters import identify
from clipcid_cli.steps.settings.balance import BalanceSettings

if TYPE_CHECKING:
    from clipcid_cli.steps.balance.filters.filter import Filter
    from clipcid_cli.steps.balance.filters.reference import NamedReference, Reference


@dataclasses.dataclass(frozen=True)
class BalanceInputs:
    """What is read."""

    embeddings: Embeddings
    references: Sequence[NamedReference]
    filters: Sequence[Filter]
    seconds: dict[str, float]  # time by phase, to which later phases add theirs


@dataclasses.dataclass(frozen=True, kw_only=True)
class BalancePlan:
    """What one `balance` works on; picklable."""

    settings: BalanceSettings
    embeddings: Embeddings
    data: Dataset | None = None  # the data that kept samples are copied from; None where they are not
    filters: Sequence[Filter] = ()  # in the order in which they drop images
    references: Sequence[Reference] = ()
    spec: OutputSpec[BalanceSidecar]
    seconds: dict[str, float]

    @property
    def folder(self) -> Path:
        return WorkDirectory(self.settings.work).balance

    @property
    def keep_list(self) -> Path:
        return self.folder / KEEP_LIST

    def references_of(self, flag: str) -> list[Reference]:
        return [reference for reference in self.references if reference.flag == flag]


def make_plan(settings: BalanceSettings, inputs: BalanceInputs) -> BalancePlan:
    """Decide, on the first process, what is balanced and written; refuse what would fail after hours of search."""
    return plan_checked(settings, inputs, check_inputs(settings, inputs))


def plan_checked(settings: BalanceSettings, inputs: BalanceInputs, data: Dataset | None = None) -> BalancePlan:
    """Decide it for inputs that have been checked."""
    references: list[Reference] = []
    if inputs.references:
        from clipcid_cli.steps.balance.filters.reference import plan_references

        references = plan_references(inputs.references)
    spec = _identify(settings, inputs, references)
    if not settings.overwrite:
        _validate_none_lost(spec.folder, inputs.embeddings)
    return BalancePlan(
        settings=settings,
        embeddings=inputs.embeddings,
        data=data,
        filters=inputs.filters,
        references=references,
        spec=spec,
        seconds=inputs.seconds,
    )


def check_inputs(settings: BalanceSettings, inputs: BalanceInputs) -> Dataset | None:
    """Check that what is read has what the settings need; return the data that kept samples are copied from."""
    embeddings = inputs.embeddings
    _note_new_shards(settings, embeddings)
    data = None
    if settings.writes_samples:
        from clipcid_cli.steps.balance.write_data import open_source

        data = open_source(settings, embeddings)
    if settings.write_uids is not None:
        from clipcid_cli.steps.balance.uids import validate_uids

        validate_uids(settings, embeddings)
    if settings.reads_texts and not embeddings.has_texts:
        raise _no_texts_error(settings, embeddings)
    if inputs.references:
        from clipcid_cli.steps.balance.filters.reference import validate_usable

        validate_usable(inputs.references)
    return data


def _no_texts_error(settings: BalanceSettings, embeddings: Embeddings) -> ClipcidError:
    flags = flag_words(
        min_caption_similarity=settings.min_caption_similarity,
        max_caption_similarity=settings.max_caption_similarity,
        select="similarity" if settings.select == "similarity" else None,
    )
    return ClipcidError(
        f"{embeddings.folder} contains no text embeddings, which are needed for {flags}.",
        f"Omit {flags}, or embed captions too; the data needs some. {embeddings.embed_again(text=True)}",
    )


def _identify(
    settings: BalanceSettings, inputs: BalanceInputs, references: Sequence[Reference]
) -> OutputSpec[BalanceSidecar]:
    """Say what decides the output.

    All settings may change on an existing forest; of the inputs, there may be more.
    """
    embeddings = inputs.embeddings
    opened = [embeddings, *(reference.embeddings for reference in references)]
    files = embeddings.fingerprints([Kind.TEXTS] if settings.reads_texts else [])
    texts = files.pop() if settings.reads_texts else None
    identity = {name: getattr(settings, name) for name in settings.decisive} | {
        "seed": settings.seed if settings.select == "random" else None,
        "texts": None if texts is None else texts.hash,
        "keys": next((rows.key_rule for rows in opened if rows.key_rule is not None), None),
    }
    identity |= identify(inputs.filters, references)
    return OutputSpec(
        WorkDirectory(settings.work).balance,
        "balance",
        BalanceSidecar,
        settings=identity,
        inputs=files,
        overwrite=settings.overwrite,
        may_differ={*identity} if settings.overwrite else {*identity, "inputs"},
    )


def _note_new_shards(settings: BalanceSettings, embeddings: Embeddings) -> None:
    """Say that the data has more shards than its embeddings, and how to take them in, where no data was named."""
    if settings.data is not None or settings.embeddings is not None or embeddings.sidecar is None:
        return
    spec = embeddings.sidecar.data.spec
    embedded = set(embeddings.shards)
    now = list[str]()
    with suppress(ClipcidError):  # it is gone, and not needed
        now = list_shards(spec)
    new = len(set(now) - embedded)
    if new and not embedded.isdisjoint(now):
        shards = "1 shard that is" if new == 1 else f"{new:,} shards that are"
        reporting.note(f"{spec} has {shards} not embedded yet. To include them, name the data in the command.")


def _validate_none_lost(folder: Path, embeddings: Embeddings) -> None:
    """Refuse embeddings that lack files of an output of `balance`, finished or not."""
    now = list_row_numbering(embeddings)
    fix = f"Add --overwrite to replace it, or write elsewhere ({WORK})."
    for holder in (folder, *find_works(folder, "balance")):
        path = holder / ROW_NUMBERING
        if path.exists() and (lost := find_lost(read_row_numbering(path, fix), now)):
            raise other_run_error(f"{folder} holds balance output", {"inputs": lost})


def list_row_numbering(embeddings: Embeddings) -> list[NumberedFile]:
    """List the files through which rows are numbered, each with the metadata beside it."""
    metadata = iter(embeddings.contents(METADATA))
    files: list[NumberedFile] = []
    for images, file in zip(embeddings.contents(Kind.IMAGES), embeddings.files, strict=True):
        files.append(NumberedFile(images.path, images.size, images.hash, rows=file.rows))
        if file.metadata is not None:
            beside = next(metadata)
            files.append(NumberedFile(beside.path, beside.size, beside.hash))
    return files
