"""What filters compare images with: the rows of references, which are embeddings, or images embedded by the same model."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from clipcid_cli.algorithms.near.edges import Edges
from clipcid_cli.algorithms.near.exact import BoolArray, FloatArray, HalfArray, IntArray, ReadRows, row_type
from clipcid_cli.algorithms.near.jobs import rectangle
from clipcid_cli.algorithms.sets.sinks import NearestOf
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.arrays import Arrays, map_strings
from clipcid_cli.formats.embeddings.folder import KEY_COLUMN, Embeddings, open_embeddings
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.formats.results.keep_list import Column, float_column
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.runtime.distributed import DistContext
from clipcid_cli.runtime.models.names import parse_model, with_default_tag
from clipcid_cli.steps import reporting
from clipcid_cli.steps.balance.balance_run import BalanceRun
from clipcid_cli.steps.balance.cost_result import ReferenceCost
from clipcid_cli.steps.balance.filters.reference import Reference
from clipcid_cli.steps.balance.pictures import ReportPictures, pair_up
from clipcid_cli.steps.balance.plan import BalanceInputs
from clipcid_cli.steps.balance.result import ReferenceResult
from clipcid_cli.steps.balance.run_search import Search, run_search
from clipcid_cli.steps.balance.saved_search import find_place
from clipcid_cli.steps.embed.result import EmbedCost, Embedded
from clipcid_cli.steps.embeddings import open_given
from clipcid_cli.steps.models import find_mismatch, find_model
from clipcid_cli.steps.open_data import holds_embeddings, open_named, refuse_empty
from clipcid_cli.steps.settings.balance import BalanceSettings
from clipcid_cli.steps.settings.embed import EmbedSettings

# Pairs of a reference that the report shows.
_PAIRS_SHOWN = 12


def validate_references(settings: BalanceSettings, model: str | None) -> None:
    """Refuse references that cannot be compared, before anything is embedded, with a model if one is given."""
    _validate_none_missing(settings)
    if model is not None:
        _validate_models(settings, model)


def _validate_none_missing(settings: BalanceSettings) -> None:
    """Refuse references that are neither embeddings nor data, before anything is embedded."""
    for flag, name in settings.named_references:
        try:
            refuse_empty(name)
            if not holds_embeddings(Path(name)):
                # References are joined by no key.
                indexes = WorkDirectory(settings.work).indexes
                open_named(dataclasses.replace(settings, key_column=KEY_COLUMN), name, indexes)
        except ClipcidError as error:
            raise ClipcidError(f"{flag} {name or repr(name)}: {error.message}", error.fix) from error


def _validate_models(settings: BalanceSettings, model: str) -> None:
    """Refuse references that another model folder embedded than `model`, which has yet to embed the images to balance.

    Weights behind other names are compared once the images are embedded: two names may be of the same ones.
    """
    named = with_default_tag(find_model(model))
    if named.path is None:
        return
    for flag, name in settings.named_references:
        folder = Path(name)
        if not holds_embeddings(folder):
            continue
        reference = open_embeddings(folder, settings.keys, settings.array_name).model
        if reference is None or parse_model(reference.spec).path is None:
            continue
        difference = find_mismatch(reference, named)
        if difference is not None and difference.what == "weights":
            raise ClipcidError(
                f"The embeddings in {folder} are of {reference.spec} ({difference.recorded}), and the images to balance "
                f"are to be embedded with {named.spec} ({difference.named}).",
                _advise_same_model(flag),
            )


def _advise_same_model(flag: str) -> str:
    return f"Embed it with the same model: give the images themselves ({flag} DATA)."


def open_reference(
    settings: BalanceSettings, embeddings: Embeddings, flag: str, name: str, context: DistContext
) -> Embeddings | EmbedCost:
    """Open the embeddings of a reference; where there are none make them, or in a dry run return what that would cost."""
    folder = Path(name)
    if not holds_embeddings(folder):
        folder, cost = _embed(settings, embeddings, flag, name, context)
        if isinstance(cost, EmbedCost):
            return cost
    reference = open_given(settings, folder, None if settings.dry_run else settings.work, needs_column=False)
    _validate_same_model(embeddings, reference, flag, name)
    return reference


def _embed(
    settings: BalanceSettings, embeddings: Embeddings, flag: str, data: str, context: DistContext
) -> tuple[Path, Embedded]:
    """Embed reference images as the embeddings to balance were, into the folder; what is there already is taken."""
    model = settings.model if embeddings.sidecar is None else embeddings.sidecar.model.spec
    if model is None:
        raise ClipcidError(
            f"{data} contains no embeddings, and {embeddings.folder} does not record the model to embed it with.",
            f"Name the model (--model M), or give a folder of embeddings: {flag} EMB",
        )
    from clipcid_cli.steps.embed.run import make_embeddings

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
        embedded = make_embeddings(EmbedSettings.asked_by(settings, **given), context)
    except ClipcidError as error:
        raise ClipcidError(f"{flag} {data}: {error.message}", error.fix) from error
    return folder, embedded


def _validate_same_model(embeddings: Embeddings, reference: Embeddings, flag: str, name: str) -> None:
    """Refuse a reference of another width; where both say how they were made, of another model or preprocessing."""
    if embeddings.width != reference.width:
        raise ClipcidError(
            f"The embeddings in {name} have width {reference.width}, those in {embeddings.folder} {embeddings.width}.",
            _advise_same_model(flag),
        )
    sidecars = [side.sidecar for side in (embeddings, reference) if side.sidecar is not None]
    if len(sidecars) < 2:
        return
    own, other = (sidecar.model for sidecar in sidecars)
    if own.weights_hash != other.weights_hash:
        raise ClipcidError(
            f"The embeddings in {name} are of {other.spec} ({other.weights_hash}), those in {embeddings.folder} "
            f"of {own.spec} ({own.weights_hash}).",
            _advise_same_model(flag),
        )
    decoded = [sidecar.made for sidecar in sidecars]
    if decoded[0].preprocess != decoded[1].preprocess:
        ways = ["with" if side.fast_decode else "without" for side in decoded]
        raise ClipcidError(
            f"The images of {name} were preprocessed differently ({decoded[1].preprocess}, {ways[1]} --fast-decode) than "
            f"those of {embeddings.folder} ({decoded[0].preprocess}, {ways[0]}).",
            f"Embed them in the same way: give the images themselves ({flag} DATA).",
        )


def name_contents(references: Sequence[Reference], flag: str) -> list[list[str]]:
    """Name the references of a flag by what they hold."""
    return [[reference.name, reference.identity] for reference in references if reference.flag == flag]


def count_references(inputs: BalanceInputs, flag: str, compared: int) -> list[ReferenceCost]:
    """Count what it takes to compare so many images with the references of a flag."""
    costs = list[ReferenceCost]()
    for reference in inputs.references:
        if reference.flag == flag:
            embedding = reference.rows if isinstance(reference.rows, EmbedCost) else None
            costs.append(
                ReferenceCost(
                    name=reference.name,
                    rows=reference.num_rows,
                    to_embed=embedding is not None,
                    embed_seconds=0.0 if embedding is None else embedding.seconds["encode"],
                    pairs=compared * reference.num_rows,
                )
            )
    return costs


@dataclasses.dataclass(frozen=True)
class Nearest:
    """The nearest reference row of each row, where one is near enough."""

    references: Sequence[Reference]
    threshold: float
    # Which reference has the row nearest to each row, int16 [N]; the first of equals, −1 where none is near enough.
    owner: npt.NDArray[np.int16]
    row: IntArray  # that row of its embeddings, integers [N]; of no meaning where there is none
    distance: FloatArray  # its distance, float32 [N]; NaN where there is none
    near: list[int]  # how many rows lie near each reference, whatever other references they are near
    searches: frozenset[str]  # the names of the comparisons it was made of, which later runs may need

    @property
    def is_near(self) -> BoolArray:
        """Which rows are near a reference, bool [N]."""
        return np.asarray(self.owner >= 0)

    def name_equal(self) -> str:
        """Return the end of a sentence: how many rows are equal to one of the references, which may be the data itself."""
        equal = int(np.count_nonzero(self.distance == 0))
        if not equal:
            return "."
        names = " or ".join(reference.name for reference in self.references)
        return f"; {equal:,} are equal to one. Is {names} the data itself?"

    def count(self) -> list[ReferenceResult]:
        """Count the rows near each reference."""
        nearest = np.bincount(self.owner[self.is_near], minlength=len(self.references)).tolist()
        return [
            ReferenceResult(reference.name, len(reference.numbers), near, count)
            for reference, near, count in zip(self.references, self.near, nearest, strict=True)
        ]

    def columns(self, name: str, folder: Path) -> list[Column]:
        """Return the columns of the keep list, which name the nearest reference row of each row that is near one.

        Keys, which may be more than memory holds, are mapped in a folder.
        """
        keys: dict[int, pa.Array] = {}

        def read_names(part: slice) -> pa.Array:
            owner = self.owner[part]
            return pa.array([reference.name for reference in self.references]).take(pa.array(owner, mask=owner < 0))

        def read_keys(part: slice) -> pa.Array:
            owner = self.owner[part]
            keys_read = pa.nulls(part.stop - part.start, pa.string())
            for index in np.unique(owner[owner >= 0]).tolist():
                if index not in keys:
                    embeddings = self.references[index].embeddings
                    chunks = (chunk for file in embeddings.files for chunk in embeddings.keys_of(file).chunks)
                    keys[index] = map_strings(folder, chunks)
                is_its = owner == index
                named = keys[index].take(pa.array(self.row[part][is_its])).cast(pa.string())
                keys_read = pc.replace_with_mask(keys_read, pa.array(is_its), named)
            return keys_read

        return [
            Column(name, pa.string(), read_names),
            Column(f"{name}_key", pa.string(), read_keys),
            float_column(f"{name}_distance", self.distance),
        ]

    def show(self, run: BalanceRun, pictures: ReportPictures) -> list[dict[str, Any]]:
        """Choose some pairs of each reference, from the nearest to the farthest, and load their images."""
        shown = []
        for index, reference in enumerate(self.references):
            rows = np.flatnonzero(self.owner == index)
            rows = rows[np.argsort(self.distance[rows], kind="stable")]
            chosen = rows[np.linspace(0, len(rows) - 1, min(len(rows), _PAIRS_SHOWN)).round().astype(np.int64)]
            theirs = ReportPictures(run, reference.embeddings)
            ours = pictures.load(run.rows.numbers[chosen])
            pairs = pair_up(ours, theirs.load(self.row[chosen]), self.distance[chosen])
            shown.append({"name": reference.name, "count": len(rows), "pairs": pairs})
        return shown


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The nearest row of each reference, up to a distance, of each unique row to be searched."""

    run: BalanceRun
    references: Sequence[Reference]
    pairs: list[Edges]  # of each reference, whose rows are numbered after those of the run
    searches: frozenset[str]

    def up_to(self, threshold: float) -> Nearest:
        """Choose what is within a distance, inclusive, on the first process; the same on every process."""

        def merge() -> Arrays:
            rows = self.run.rows
            owner = np.full(len(rows), -1, np.int16)
            near = np.zeros(len(self.references), np.int64)
            kind = row_type(max(reference.embeddings.num_rows for reference in self.references))
            row = np.zeros(len(rows), kind)
            distance = np.full(len(rows), np.inf, np.float32)
            copies = np.ones(len(rows), np.int32)
            np.add.at(copies, rows.copies.a, 1)
            for index, (reference, pairs) in enumerate(zip(self.references, self.pairs, strict=True)):
                pairs = pairs[pairs.weight <= np.float32(threshold)]
                near[index] = copies[pairs.a].sum()
                nearer = pairs[pairs.weight < distance[pairs.a]]
                owner[nearer.a], distance[nearer.a] = index, nearer.weight
                row[nearer.a] = reference.numbers[nearer.b - len(rows)]
            for values in (owner, row, distance):  # copies are as near as the first of their kind
                values[rows.copies.b] = values[rows.copies.a]
            distance[owner < 0] = np.nan
            return owner, row, distance, near

        owner, row, distance, near = self.run.shared.publish(merge)
        return Nearest(self.references, threshold, owner, row, distance, near.tolist(), self.searches)


def compare(
    run: BalanceRun, references: Sequence[Reference], distances: Sequence[Sequence[float]], label: str
) -> Comparison:
    """Compare all rows that are to be searched with all references; the same on every process.

    What was compared stays for later runs in the folder of `balance`.

    Args:
        distances: Of each reference, ascending: rows that have a near one within one of them are compared no farther.
    """
    pairs, searches = list[Edges](), set[str]()
    for reference, ascending in zip(references, distances, strict=True):
        others, read = number_rows(run, reference)
        left = run.rows.unique.astype(others.dtype, copy=False)
        steps = list[Edges]()
        for distance in ascending:
            if not len(left):
                break
            nearest, name = _compare(run, reference, left, others, read, distance, label)
            steps.append(nearest)
            searches.add(name)
            left = np.setdiff1d(left, nearest.a, assume_unique=True)
        pairs.append(Edges.concatenate(steps))
    return Comparison(run, references, pairs, frozenset(searches))


def _compare(
    run: BalanceRun,
    reference: Reference,
    rows: IntArray,
    others: IntArray,
    read: ReadRows,
    searched_to: float,
    label: str,
) -> tuple[Edges, str]:
    """Find the nearest row of a reference of each of some rows; return the pairs, and the name that they are saved under."""
    jobs = rectangle(rows, others, run.rows_in_memory)
    search = Search(label, jobs, read, searched_to, lambda: NearestOf(rows), lambda: reference.identity, stays=True)
    return run_search(run, search), find_place(run, search).name


def number_rows(run: BalanceRun, reference: Reference) -> tuple[IntArray, ReadRows]:
    """Number the rows of a reference after those to balance; return their numbers, and what reads rows of one of both."""
    images = reference.embeddings.rows(Kind.IMAGES)
    num_rows = len(run.rows)
    numbers = np.arange(num_rows, num_rows + len(reference.numbers))

    def read(rows: IntArray) -> HalfArray:
        return run.rows.read(rows) if rows[0] < num_rows else images.take(reference.numbers[rows - num_rows])

    return numbers.astype(row_type(num_rows + len(numbers))), read
