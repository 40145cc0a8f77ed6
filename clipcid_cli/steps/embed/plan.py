"""What `embed` will do: all that can be wrong with data and output is found before a model is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from contextlib import nullcontext, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.addresses import is_remote
from clipcid_cli.formats.data.dataset import Dataset, open_described
from clipcid_cli.formats.data.samples import MAX_SAMPLE_BYTES, Sample
from clipcid_cli.formats.embeddings.manifest import read_manifest
from clipcid_cli.formats.embeddings.sidecar import EmbedSidecar, recorded_data
from clipcid_cli.formats.embeddings.writer import FINISHED, read_unfinished
from clipcid_cli.formats.fingerprint import FileRecord, find_lost, record_together
from clipcid_cli.formats.output import (
    OutputSpec,
    compare_settings,
    find_output,
    is_claimed,
    other_run_error,
    remove_leftovers,
    unfinished,
)
from clipcid_cli.formats.sidecar import DataSpec, read_sidecar, sidecar_path
from clipcid_cli.formats.skips import Skips
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.runtime.array_task import choose_task
from clipcid_cli.runtime.models.names import ModelName, with_default_tag
from clipcid_cli.steps import reporting
from clipcid_cli.steps.models import choose_embeddings, find_embedded_model, find_mismatch, find_model
from clipcid_cli.steps.open_data import note_left_out, open_named
from clipcid_cli.steps.settings.embed import DEFAULT_MODEL, EmbedSettings
from clipcid_cli.steps.settings.shared import url_of

EMBED = "embed"
"""Name of the sidecar of embeddings."""
# The flags that choose another place; other commands, which embed too, have no --out.
ELSEWHERE = "--work, or --out of clipcid embed"
# Settings in the sidecar that are known once the model is loaded.
_OF_MODEL = ("weights", "tokenizer", "precision", "batch_size", "preprocess")
# Settings that only earlier versions recorded, of kinds of views that are no longer drawn; the kinds are compared.
_OF_EARLIER = ("strong_view",)

# The flags that decide which rows a list has, by their names in the record of the data.
_OF_ROWS = {
    "image": "image_column",
    "caption": "caption_column",
    "key": "key_column",
    "list_separator": "list_separator",
    "list_encoding": "list_encoding",
}

# Steps whose output is a folder that someone might give as --out.
_OTHER_OUTPUTS = ("balance", "cluster", "distill", "export")

_LOOKED_AT = 100  # samples, for captions of every key
_NAMED_COLUMNS = 12


@dataclasses.dataclass(frozen=True)
class EmbedPlan:
    """What is embedded, and where."""

    settings: EmbedSettings
    without_text: str  # how to embed the images alone, for the errors; empty when captions are needed
    folder: Path
    name: ModelName
    dataset: Dataset
    shards: list[FileRecord]  # content and name of each shard
    # The sidecar of finished embeddings that match the request; None where there is something to do.
    finished: EmbedSidecar | None = None
    task: tuple[int, int] | None = None  # which part is embedded, of how many; None for all
    is_begun: bool = False  # whether an unfinished run on the very same data has left its work
    # Whether all shards that are embedded already are still there, so that others may be added to them.
    may_grow: bool = False

    def reject(self, sample: Sample) -> str | None:
        """Say why a sample cannot be used, as a reason of `skips.REASONS`."""
        return "no_caption" if self.settings.text and not sample.captions else None

    @property
    def input(self) -> FileRecord:
        return record_together(self.dataset.spec, self.shards)

    def identify(self, of_model: dict[str, Any], may_differ: Collection[str]) -> OutputSpec[EmbedSidecar]:
        """Say what decides the output, given the settings of the model."""
        return OutputSpec(
            self.folder,
            EMBED,
            EmbedSidecar,
            settings=self.requested | of_model,
            inputs=[self.input],
            overwrite=self.settings.overwrite,
            may_differ=may_differ,
            elsewhere=ELSEWHERE,
            parts=FINISHED,
            begun_may_differ={"keys"} if self.keys_are_free else (),
        )

    @property
    def keys_are_free(self) -> bool:
        """Whether rows are the same whatever their keys are, so that these alone are rewritten: views are drawn by key."""
        settings = self.settings
        has_numbers = self.dataset.kind == "parquet" and self.dataset.keys == "sample"
        return not (settings.views or settings.text_variants or has_numbers)

    def decide_rows(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Return what of all settings decides the rows of a shard."""
        return settings | {"keys": "sample"} if self.keys_are_free else settings

    @property
    def requested(self) -> dict[str, Any]:
        """The settings that decide the rows, as JSON values, but for those of the model."""
        settings = self.settings
        requested: dict[str, Any] = {
            "text": settings.text,
            "keys": self.dataset.keys,
            "fast_decode": settings.fast_decode,
        }
        if self.dataset.caption_lines:
            requested["caption_lines"] = True
        if self.dataset.caption_keys:
            requested["caption_key"] = list(self.dataset.caption_keys)
        if settings.max_sample_bytes != MAX_SAMPLE_BYTES:
            requested["max_sample_bytes"] = settings.max_sample_bytes
        if settings.views or settings.text_variants:
            from clipcid_cli.steps.embed.augmented import augmenting_settings

            requested |= augmenting_settings(settings)
        return requested


def make_plan(settings: EmbedSettings, without_text: str) -> EmbedPlan:
    """Look at the data, the model's name and the output."""
    name = with_default_tag(find_model(_choose_model(settings)))
    task = None if settings.part is None else choose_task(settings.part)
    dataset = _open_data(settings, name)
    note_left_out(dataset)
    folder = _choose_folder(settings, name, task)
    plan = EmbedPlan(settings, without_text, folder, name, dataset, describe_shards(dataset), task=task)
    if folder.exists():
        _validate_own_folder(folder)
        with suppress(ClipcidError) if settings.overwrite else nullcontext():  # what is replaced need not be readable
            plan = _look_at_output(plan)
    else:
        plan = dataclasses.replace(plan, may_grow=True)  # there is nothing to compare with
    # After the output: where that is of other data, the remedies for captions would replace it.
    if settings.text and plan.finished is None:
        if not _has_captions(dataset):
            raise _no_captions_error(dataset, without_text)
        _look_at_captions(dataset)
    return plan


def take_finished(plan: EmbedPlan, finished: EmbedSidecar) -> None:
    """Say, on the first process, that the embeddings are there, and remove what a killed run has left beside them."""
    if not plan.settings.dry_run:
        spec = OutputSpec(plan.folder, EMBED, EmbedSidecar, settings=finished.settings, inputs=finished.inputs)
        remove_leftovers(spec)
    reporting.note(f"{plan.folder} already holds the embeddings of {plan.dataset.spec} with {plan.name.spec}.")


def _look_at_output(plan: EmbedPlan) -> EmbedPlan:
    """Compare the request with what the folder holds, as far as that is known before the model is loaded."""
    folder = plan.folder
    sidecar = read_sidecar(sidecar_path(folder, EMBED), EmbedSidecar)
    if sidecar is None:
        there = read_unfinished(folder, EMBED)
    else:
        if find_mismatch(sidecar.model, plan.name) is None:
            # What the request leaves open is as it was; it would differ on another machine, for one.
            model = {name: value for name, value in sidecar.settings.items() if name in (*_OF_MODEL, *_OF_EARLIER)}
            asked = {"batch_size": plan.settings.batch_size, "precision": plan.settings.precision}
            model |= {name: value for name, value in asked.items() if value not in (None, "auto")}
            output = find_output(plan.identify(model, may_differ={"inputs"}))
            if output.finished is not None:
                return dataclasses.replace(plan, finished=output.finished)
        there = [record.input for record in read_manifest(folder, "Add --overwrite to replace it.")]
    lost = find_lost(there, plan.shards)
    begun = unfinished(folder, EMBED)
    if lost and not plan.settings.overwrite:
        flags = _compare_reading(sidecar.data, plan.dataset) if sidecar is not None else {}
        before = [file.path for file in begun.inputs] if begun is not None else []
        if sidecar is not None:
            before = [sidecar.data.spec]
        changes = flags or _describe_lost(before, plan.dataset, lost)
        raise other_run_error(f"{folder} holds {EMBED} output", changes, ELSEWHERE)
    is_begun = begun is not None and [file.content for file in begun.inputs] == [plan.input.content]
    return dataclasses.replace(plan, is_begun=is_begun, may_grow=not lost)


def _compare_reading(there: DataSpec, dataset: Dataset) -> dict[str, str]:
    """Return the flags by which the same list is read otherwise than before: it has other rows, though nobody changed it."""
    now = dataset.describe()
    if dataset.kind != "list" or there.spec != now.spec:
        return {}
    before, after = ({flag: getattr(spec, name) for name, flag in _OF_ROWS.items()} for spec in (there, now))
    return compare_settings(before, after)


def _describe_lost(before: list[str], dataset: Dataset, lost: str) -> dict[str, str]:
    """Name the data, as typed then and now; of the same name, what has become of its files."""
    is_other = before and before != [dataset.spec]
    change = f"{before[0]} before, {dataset.spec} now" if is_other else f"{dataset.spec} has changed"
    return {"data": change if dataset.kind == "list" else f"{change}: {lost}"}


def _choose_folder(settings: EmbedSettings, name: ModelName, task: tuple[int, int] | None) -> Path:
    """Return the folder of the embeddings; of those that are sent to an object store, where each shard is made."""
    if settings.out is None:
        return choose_embeddings(settings.work, name)
    url = url_of(settings.out)
    if url is None:
        return settings.out
    from clipcid_cli.formats.data.object_store import ObjectStore  # few runs write to one

    ObjectStore(url).names()  # an error where it cannot be asked
    assert task is not None, "only parts are sent"
    return WorkDirectory(settings.work).sending(url, task)


def _choose_model(settings: EmbedSettings) -> str:
    """Return the model that was named; else that of the embeddings whose data is taken."""
    if settings.model is not None:
        return settings.model
    model = find_embedded_model(WorkDirectory(settings.work)) if settings.data is None else None
    if model is None:
        return DEFAULT_MODEL
    reporting.note(f"Model: {model}, that of the embeddings in {settings.work}.")
    return model


def _open_data(settings: EmbedSettings, name: ModelName) -> Dataset:
    """Open the data that was named, or else the data of which the work directory holds embeddings."""
    work = WorkDirectory(settings.work)
    if settings.data is None:
        try:
            own = choose_embeddings(settings.work, name)
            described = recorded_data(own if sidecar_path(own, EMBED).exists() else work.find_embeddings())
        except ClipcidError as error:
            raise ClipcidError(
                f"No data was given, and the work directory names none: {error.message}",
                "Give the data as the first argument: a folder of tar shards, one tar, a folder of images or a list.",
            ) from error
        dataset = open_described(described, work.indexes, **settings.trust)
        reporting.note(f"Taking the data of the embeddings in {settings.work}: {dataset.spec}.")
        return dataset
    return open_named(settings, settings.data, work.indexes)


def choose_text(settings: EmbedSettings, name: ModelName) -> bool:
    """Tell whether captions are embedded where nobody says so: where the data has some."""
    dataset = _open_data(settings, name)
    if _has_captions(dataset):
        return True
    reporting.note(f"{dataset.spec} has no captions{_name_keys(dataset)}: only its images are embedded.")
    return False


def _no_captions_error(dataset: Dataset, without_text: str) -> ClipcidError:
    """Return the error for data without captions: of a list they are mostly in a column of another name."""
    problem = f"{dataset.spec}: no sample of the first shard has a caption{_name_keys(dataset)}"
    fixes = ["Put captions next to the images (.txt), or name their place with --caption-key."]
    if dataset.kind in ("list", "parquet"):
        fixes = [f"Name their column with {'--caption-key' if dataset.caption_keys else '--caption-column'}."]
    if without_text:
        fixes.insert(1 if dataset.kind == "list" else 0, without_text)
    columns = dataset.shards[0].column_names()
    if columns:
        problem += f"; the list has the columns {', '.join(columns[:_NAMED_COLUMNS])}"
    others = [f"Or {fix[0].lower()}{fix[1:]}" for fix in fixes[1:]]
    return ClipcidError(f"{problem}.", "\n".join([fixes[0], *others]))


def _name_keys(dataset: Dataset) -> str:
    return f" {' or '.join(dataset.caption_keys)}" if dataset.caption_keys else ""


def _has_captions(dataset: Dataset) -> bool:
    """Tell whether any sample has a caption, of the first shard that has samples."""
    if dataset.index is not None:
        return next((record.with_captions > 0 for record in dataset.index.records if record.samples), False)
    for shard in dataset.shards:
        samples = shard.stream()
        first = next(samples, None)
        if first is not None:
            return bool(first.captions) or any(sample.captions for sample in samples)
    return False


def _look_at_captions(dataset: Dataset) -> None:
    """Say what the first samples show: texts of several lines, each taken as one caption, and keys that may be misspelt."""
    has_texts = dataset.kind in ("webdataset", "images") and not dataset.caption_lines
    notes_lines = has_texts and not is_remote(dataset.shards[0].file)
    if not notes_lines and not dataset.caption_keys:
        return
    skips = Skips()
    looked_at = len(list(islice(dataset.shards[0].stream(skips), _LOOKED_AT)))
    count = skips.changed.get("several_lines")
    if notes_lines and count:
        reporting.note(
            f"{count:,} of the first {looked_at:,} samples have a caption of several lines, of which a model reads the "
            "beginning; with --caption-lines each line of a .txt is a caption."
        )
    for key in dataset.caption_keys:
        if looked_at and skips.without.get(key) == looked_at:
            reporting.warn(f"None of the first {looked_at} samples has a caption {key}.")


def describe_shards(dataset: Dataset) -> list[FileRecord]:
    """Describe every shard: its content, and its name, which the metadata repeats."""
    described = zip(dataset.fingerprints(), dataset.shards, strict=True)
    return [msgspec.structs.replace(record, shard=shard.name) for record, shard in described]


def _validate_own_folder(folder: Path) -> None:
    """Refuse a folder with embeddings that this step did not write, since it would replace files there."""
    output = next((step for step in _OTHER_OUTPUTS if is_claimed(folder, step)), None)
    if output is not None:
        raise ClipcidError(f"{folder} holds the output of clipcid {output}.", "Choose another folder with --out.")
    from clipcid_cli.formats.embeddings.layouts import find_rows

    first = None if is_claimed(folder, EMBED) else find_rows(folder)
    if first is not None:
        raise ClipcidError(
            f"{folder} contains embeddings that clipcid did not write, such as {first}.",
            "Choose another folder with --out, or remove them.",
        )
