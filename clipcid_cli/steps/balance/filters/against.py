"""``--against``: images near a reference are dropped. References are embeddings, or images embedded by the same model."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from clipcid_cli.algorithms.near.edges import Edges
from clipcid_cli.algorithms.near.exact import BoolArray, FloatArray, HalfArray, IntArray, row_type
from clipcid_cli.algorithms.near.plan import rectangle
from clipcid_cli.algorithms.sets.sinks import NearestOf
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.arrays import Arrays, map_strings
from clipcid_cli.formats.embeddings.folder import KEY_COLUMN, Embeddings, has_usable_row, open_embeddings
from clipcid_cli.formats.embeddings.rows import Kind
from clipcid_cli.formats.fingerprint import identity_of
from clipcid_cli.formats.results.keep_list import Column, float_column
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.runtime.distributed import DistContext
from clipcid_cli.runtime.models.names import parse_model, with_default_tag
from clipcid_cli.steps import reporting
from clipcid_cli.steps.balance.balance_run import BalanceRun, Reference
from clipcid_cli.steps.balance.chunks import Search, run_chunks
from clipcid_cli.steps.balance.result import AgainstResult, ReferenceResult
from clipcid_cli.steps.data_index import holds_embeddings, open_named
from clipcid_cli.steps.embed.result import EmbedCost, Embedded
from clipcid_cli.steps.embed.run import make_embeddings
from clipcid_cli.steps.embeddings import open_given
from clipcid_cli.steps.models import find_mismatch
from clipcid_cli.steps.settings.balance import BalanceSettings
from clipcid_cli.steps.settings.embed import EmbedSettings

# In the folder of `balance`: what was compared, for later runs.
_FOLDER = ".references"
_SAME_MODEL = "Embed it with the same model: give the images themselves (--against DATA)."


def validate_none_missing(settings: BalanceSettings) -> None:
    """Refuse references that are neither embeddings nor data, before anything is embedded."""
    for name in settings.against:
        if not holds_embeddings(Path(name)):
            try:
                # References are joined by no key.
                indexes = WorkDirectory(settings.work).indexes
                open_named(dataclasses.replace(settings, key_column=KEY_COLUMN), name, indexes)
            except ClipcidError as error:
                raise ClipcidError(f"--against {name}: {error.message}", error.fix) from error


def validate_models(settings: BalanceSettings, model: str) -> None:
    """Refuse references that another model folder embedded than `model`, which has yet to embed the images to balance.

    Weights behind other names are compared once the images are embedded: two names may be of the same ones.
    """
    named = with_default_tag(parse_model(model))
    if named.path is None:
        return
    for folder in filter(holds_embeddings, map(Path, settings.against)):
        reference = open_embeddings(folder, settings.keys, settings.array_name).model
        if reference is None or parse_model(reference.spec).path is None:
            continue
        difference = find_mismatch(reference, named)
        if difference is not None and difference.what == "weights":
            raise ClipcidError(
                f"The embeddings in {folder} are of {reference.spec} ({difference.recorded}), and the images to balance "
                f"are to be embedded with {named.spec} ({difference.named}).",
                _SAME_MODEL,
            )


def open_references(settings: BalanceSettings, embeddings: Embeddings, context: DistContext) -> list[Reference]:
    """Open what ``--against`` names; images are embedded first, as the embeddings to balance were."""
    found = list[Reference]()
    for name in settings.against:
        reference = open_reference(settings, embeddings, name, context)
        assert isinstance(reference, Embeddings)  # this is no dry run
        bad = context.on_rank0(partial(reference.find_bad_rows, texts=False))
        if len(bad):
            reporting.warn(f"{len(bad):,} rows of {name} are zero or not finite, and nothing is compared with them.")
        identity = identity_of({}, context.on_rank0(reference.fingerprints))
        found.append(Reference(name, identity, reference, np.delete(np.arange(reference.num_rows), bad)))
    return found


def open_reference(
    settings: BalanceSettings, embeddings: Embeddings, name: str, context: DistContext
) -> Embeddings | EmbedCost:
    """Open the embeddings of a reference; where there are none make them, or in a dry run return what that would cost."""
    folder = Path(name)
    if not holds_embeddings(folder):
        folder, made = _embed(settings, embeddings, name, context)
        if isinstance(made, EmbedCost):
            return made
    reference = open_given(settings, folder, None if settings.dry_run else settings.work, needs_column=False)
    _validate_same_model(embeddings, reference, name)
    if not context.on_rank0(partial(has_usable_row, reference.rows(Kind.IMAGES))):
        raise ClipcidError(f"All {reference.num_rows:,} rows of {name} are zero or not finite.", "Embed again.")
    return reference


def _embed(settings: BalanceSettings, embeddings: Embeddings, data: str, context: DistContext) -> tuple[Path, Embedded]:
    """Embed reference images as the embeddings to balance were, into the folder; what is there already is taken."""
    model = settings.model if embeddings.sidecar is None else embeddings.sidecar.model.spec
    if model is None:
        raise ClipcidError(
            f"{data} contains no embeddings, and {embeddings.folder} does not record the model to embed it with.",
            "Name the model (--model M), or give a folder of embeddings: --against EMB",
        )
    name = with_default_tag(parse_model(model))
    digest = hashlib.blake2b(data.encode(), digest_size=4).hexdigest()
    folder = WorkDirectory(settings.work).references / f"{name.slug}-{digest}"
    given = {"data": data, "model": model, "text": False, "out": folder, "key_column": KEY_COLUMN}
    if embeddings.sidecar is not None:
        made_so = embeddings.sidecar.made
        given |= {"fast_decode": made_so.fast_decode, "precision": made_so.precision}
        if made_so.precision == "fp16" and context.device.type == "cpu":
            given["precision"] = "fp32"
            reporting.note(f"{embeddings.folder} was made in fp16, which needs a GPU: {data} is embedded in fp32.")
    try:
        made = make_embeddings(EmbedSettings.asked_by(settings, **given), context)
    except ClipcidError as error:
        raise ClipcidError(f"--against {data}: {error.message}", error.fix) from error
    return folder, made


def _validate_same_model(embeddings: Embeddings, reference: Embeddings, name: str) -> None:
    """Refuse a reference of another width; where both say how they were made, of another model or preprocessing."""
    if embeddings.width != reference.width:
        raise ClipcidError(
            f"The embeddings in {name} have width {reference.width}, those in {embeddings.folder} {embeddings.width}.",
            _SAME_MODEL,
        )
    sidecars = [each.sidecar for each in (embeddings, reference) if each.sidecar is not None]
    if len(sidecars) < 2:
        return
    own, other = (sidecar.model for sidecar in sidecars)
    if own.weights_hash != other.weights_hash:
        raise ClipcidError(
            f"The embeddings in {name} are of {other.spec} ({other.weights_hash}), those in {embeddings.folder} "
            f"of {own.spec} ({own.weights_hash}).",
            _SAME_MODEL,
        )
    decoded = [sidecar.made for sidecar in sidecars]
    if decoded[0].preprocess != decoded[1].preprocess:
        ways = ["with" if each.fast_decode else "without" for each in decoded]
        raise ClipcidError(
            f"The images of {name} were preprocessed differently ({decoded[1].preprocess}, {ways[1]} --fast-decode) than "
            f"those of {embeddings.folder} ({decoded[0].preprocess}, {ways[0]}).",
            "Embed them in the same way: give the images themselves (--against DATA).",
        )


@dataclasses.dataclass(frozen=True)
class NearReferences:
    """Which rows lie near a reference."""

    reason: ClassVar = "reference"
    references: Sequence[Reference]
    threshold: float
    # Which reference has the row nearest to each row, int16 [N]; the first of equals, −1 where none is near enough.
    owner: npt.NDArray[np.int16]
    row: IntArray  # that row of its embeddings, integers [N]; of no meaning where there is none
    distance: FloatArray  # its distance, float32 [N]; NaN where there is none
    near: list[int]  # how many rows lie near each reference, whatever other references they are near

    @property
    def is_dropped(self) -> BoolArray:
        """Which rows are near a reference, bool [N]."""
        return np.asarray(self.owner >= 0)

    def summarise(self) -> AgainstResult:
        nearest = np.bincount(self.owner[self.owner >= 0], minlength=len(self.references)).tolist()
        references = [
            ReferenceResult(reference.name, len(reference.numbers), near, number)
            for reference, near, number in zip(self.references, self.near, nearest, strict=True)
        ]
        return AgainstResult(self.threshold, sum(nearest), references)

    def columns(self, folder: Path) -> list[Column]:
        """Return the columns of the keep list, which name the nearest reference row of each row that is near one.

        Keys, which may be more than memory holds, are mapped in a folder.
        """
        keys: dict[int, pa.Array] = {}

        def read_names(part: slice) -> pa.Array:
            owner = self.owner[part]
            return pa.array([each.name for each in self.references]).take(pa.array(owner, mask=owner < 0))

        def read_keys(part: slice) -> pa.Array:
            owner = self.owner[part]
            found = pa.nulls(part.stop - part.start, pa.string())
            for number in np.unique(owner[owner >= 0]).tolist():
                if number not in keys:
                    embeddings = self.references[number].embeddings
                    chunks = (chunk for file in embeddings.files for chunk in embeddings.keys_of(file).chunks)
                    keys[number] = map_strings(folder, chunks)
                is_its = owner == number
                named = keys[number].take(pa.array(self.row[part][is_its])).cast(pa.string())
                found = pc.replace_with_mask(found, pa.array(is_its), named)
            return found

        return [
            Column("reference", pa.string(), read_names),
            Column("reference_key", pa.string(), read_keys),
            float_column("reference_distance", self.distance),
        ]


def find_near(run: BalanceRun) -> NearReferences:
    """Compare all rows with all references; the same on every process.

    What was compared stays for later runs in the folder of `balance`.
    """
    rows, references = run.rows, run.references
    threshold = run.settings.reference_distance
    assert threshold is not None  # the settings have checked it
    found = [_compare(run, reference, threshold) for reference in references]
    run.context.on_rank0(lambda: forget_others(run.output.folder, {name for _, name in found}))

    def merge() -> Arrays:
        owner = np.full(len(rows), -1, np.int16)
        near = np.zeros(len(references), np.int64)
        kind = row_type(max(each.embeddings.num_rows for each in references))
        row = np.zeros(len(rows), kind)
        distance = np.full(len(rows), np.inf, np.float32)
        copies = np.ones(len(rows), np.int32)
        np.add.at(copies, rows.copies.a, 1)
        for number, (reference, (pairs, _)) in enumerate(zip(references, found, strict=True)):
            near[number] = copies[pairs.a].sum()
            nearer = pairs[pairs.weight < distance[pairs.a]]
            owner[nearer.a], distance[nearer.a] = number, nearer.weight
            row[nearer.a] = reference.numbers[nearer.b - len(rows)]
        for values in (owner, row, distance):  # copies are as near as the first of their kind
            values[rows.copies.b] = values[rows.copies.a]
        distance[owner < 0] = np.nan
        return owner, row, distance, near

    owner, row, distance, near = run.shared.publish(merge)
    number = np.count_nonzero(owner >= 0)
    reporting.note(f"{number:,} of {len(rows):,} images are within {threshold:g} of a reference.")
    return NearReferences(references, threshold, owner, row, distance, near.tolist())


def _compare(run: BalanceRun, reference: Reference, threshold: float) -> tuple[Edges, str]:
    """Find the nearest row of a reference of each unique row; return the pairs, and the name that they are saved under.

    Rows of the reference are numbered after those to balance.
    """
    images = reference.embeddings.rows(Kind.IMAGES)
    num_rows = len(run.rows)

    def read(numbers: IntArray) -> HalfArray:
        return run.rows.read(numbers) if numbers[0] < num_rows else images.take(reference.numbers[numbers - num_rows])

    others = np.arange(num_rows, num_rows + len(reference.numbers))
    others = others.astype(row_type(num_rows + len(others)))
    unique = run.rows.unique.astype(others.dtype, copy=False)
    plan = rectangle(unique, others, run.rows_in_memory)
    folder = run.output.folder / _FOLDER
    search = Search("against", plan, read, threshold, lambda: NearestOf(unique), reference.identity, folder)
    return run_chunks(run, search), search.place(run).name


def forget_others(folder: Path, compared: Collection[str] = ()) -> None:
    """Remove what was compared before, but for some comparisons, from the folder of `balance`."""
    for path in (folder / _FOLDER).glob("*") if compared else [folder / _FOLDER]:
        if path.name not in compared:
            shutil.rmtree(path, ignore_errors=True)
