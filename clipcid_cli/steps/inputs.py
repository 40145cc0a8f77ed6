"""What a command is given or finds: models, embeddings, the keep list that chooses among them; what was taken is said."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from clipcid_cli.errors import ClipcidError, command_line
from clipcid_cli.formats.embeddings.folder import KEY_COLUMN, Embeddings, open_embeddings
from clipcid_cli.formats.embeddings.rows import Kind
from clipcid_cli.formats.join import Keys, join, parquet_listing
from clipcid_cli.formats.results.keep_list import read_keep_list
from clipcid_cli.formats.sidecar import (
    EmbedSidecar,
    ModelRecord,
    read_sidecar,
    sidecar_path,
)
from clipcid_cli.formats.skipped import list_rows
from clipcid_cli.formats.skips import NAMED, Skips
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.runtime.models.names import (
    CONFIG_NAME,
    ModelName,
    find_weights,
    hash_weights,
    parse_model,
    read_config,
    with_default_tag,
)
from clipcid_cli.steps import reporting
from clipcid_cli.steps.settings.shared import EmbeddingsSettings, KeptSettings, TrainingDataSettings

# The entries of a configuration's text tower that determine the tokens.
_TOKENS = ("context_length", "hf_tokenizer_name", "tokenizer_kwargs")

NO_KEEP_LIST = "none"

# Files in which a key like one of the data's is looked for, to show it in an error.
_FILES_COMPARED = 16


def choose_model(spec: str | None, work: Path, *, positional_of: str | None = None) -> ModelName:
    """Resolve a model to evaluate or export, and report whatever the user did not spell out.

    Args:
        spec: The model as named on the command line; None takes the student of the run that finished last.
        positional_of: Subcommand whose first positional `spec` is. What is no model there may be data, and the error then
            says so.
    """
    if spec is None:
        student = WorkDirectory(work).find_student()
        reporting.note(f"Model: {student}, the newest student of {work}.")
        return parse_model(str(student))
    try:
        name = with_default_tag(parse_model(spec))
    except ClipcidError as error:
        if positional_of is None or _is_of_model(Path(spec)):
            raise
        fix = f"Put the model first: clipcid {positional_of} MODEL {spec}"
        if not Path(spec).exists():
            fix = f"{error.fix}\nIf {spec} is the data: {fix[0].lower()}{fix[1:]}"
        raise ClipcidError(
            f"{error.message}\n{spec} was read as the model, because the first positional argument is the model.", fix
        ) from error
    if name.spec != spec:
        reporting.note(f"Weights: {name.spec}.")
    return name


def _is_of_model(path: Path) -> bool:
    """Tell whether what is no model that can be loaded is no data either: a run, another export, a configuration."""
    if not path.is_dir():
        return path.suffix in (".json", ".onnx", ".safetensors") and path.exists()
    names = ("student", CONFIG_NAME, "*.onnx", "*.safetensors")
    return any(next(path.glob(name), None) is not None for name in names)


class ModelMismatch(NamedTuple):
    """What differs between a recorded model and a named one, and its two values."""

    what: str
    recorded: str
    named: str


def find_mismatch(recorded: ModelRecord, name: ModelName) -> ModelMismatch | None:
    """Compare a model recorded in a sidecar with a named one; None when they are the same.

    Weights given by a tag never change, so such a model is identified by its name; a folder by its weights' bytes, its
    tokenizer, its preprocessing and its architecture.
    """
    weights = find_weights(name.path) if name.path is not None else None
    if weights is None or name.path is None:
        return None if recorded.spec == name.spec else ModelMismatch("weights", recorded.spec, name.spec)
    weights_hash = hash_weights(weights)
    if recorded.weights_hash != weights_hash:
        return ModelMismatch("weights", recorded.weights_hash, weights_hash)
    config, preprocess = read_config(name.path)
    old_config = recorded.config
    # The size is the architecture's, whatever the preprocessing says.
    pixels = [key for key in preprocess if key != "size"]
    for what, old, new, keys in (
        ("tokenizer", old_config["text_cfg"], config["text_cfg"], _TOKENS),
        ("preprocessing", recorded.preprocess, preprocess, pixels),
        ("architecture", old_config, config, sorted({*old_config, *config})),
    ):
        for key in keys:
            if old.get(key) != new.get(key):
                return ModelMismatch(what, f"{key} {json.dumps(old.get(key))}", f"{key} {json.dumps(new.get(key))}")
    return None


def choose_embeddings(work: Path, name: ModelName) -> Path:
    """Return the folder of a model's embeddings in a work directory: the one of its name.

    Where that holds embeddings of a model of the same name at another place, the hash of the weights is added to the name.
    """
    folder = WorkDirectory(work).embeddings(name.slug)
    weights = find_weights(name.path) if name.path is not None else None
    if weights is None or name.path is None:
        return folder
    recorded: ModelRecord | None = None
    with suppress(ClipcidError):  # damaged, or of an earlier version: told where it is read
        sidecar = read_sidecar(sidecar_path(folder, "embed"), EmbedSidecar)
        recorded = None if sidecar is None else sidecar.model
    if recorded is None or Path(recorded.spec).resolve() == name.path.resolve():
        return folder
    own = hash_weights(weights)
    return folder if recorded.weights_hash == own else folder.with_name(f"{folder.name}-{own.rpartition(':')[2][:8]}")


def validate_teacher(what: str, recorded: ModelRecord, teacher: ModelName, fix: str) -> None:
    """Refuse what another model than the teacher made."""
    difference = find_mismatch(recorded, teacher)
    if difference is not None:
        raise ClipcidError(
            f"The {what} are of {recorded.spec}, {difference.what} {difference.recorded}; the teacher is {teacher.spec}, "
            f"{difference.what} {difference.named}.",
            fix,
        )


def embed_with(name: ModelName, settings: TrainingDataSettings) -> str:
    """Return the command that embeds the data of this run with a model, for a fix."""
    return command_line("embed", settings.data or "DATA", model=name.spec, **settings.data_flags, work=settings.work)


def cluster_with(name: ModelName, settings: TrainingDataSettings) -> str:
    """Return the fix that makes clusters of a model whose embeddings may not exist yet."""
    embeddings = choose_embeddings(settings.work, name)
    cluster = command_line("cluster", embeddings=embeddings, work=settings.work, overwrite=True)
    return f"Run: {embed_with(name, settings)}\nThen run: {cluster}"


def open_given(
    settings: EmbeddingsSettings, folder: Path, work: Path | None, *, needs_column: bool = True
) -> Embeddings:
    """Open embeddings; of another tool's, say which column became the key. `work` is as of `open_embeddings`.

    Args:
        needs_column: Whether a column that ``--key-column`` names must be there.
    """
    embeddings = open_embeddings(folder, settings.keys, settings.array_name, work, settings.key_column)
    if embeddings.sidecar is not None:
        return embeddings
    column = embeddings.key_column
    keys = "the name of the file and the row" if column is None else f"column {column} of the metadata"
    if needs_column and settings.key_column not in (KEY_COLUMN, column):
        there = ", ".join(embeddings.metadata_columns[:12])
        raise ClipcidError(
            f"{folder}: the metadata have no column {settings.key_column!r}; "
            + (f"they have {there}." if there else "there are none."),
            f"Name another column with --key-column, or omit it: the key is then {keys}.",
        )
    reporting.note(f"{folder}: the key is {keys}.")
    return embeddings


def open_teachers(settings: KeptSettings, folders: Sequence[Path], work: Path | None) -> Embeddings:
    """Open a teacher's embeddings, or join several teachers' to those of one, and say what they are.

    `work` is as of `open_embeddings`.
    """
    opened = [open_given(settings, folder, work) for folder in folders]
    for teacher in opened:
        reporting.note(f"Embeddings: {teacher.folder}, {teacher.num_rows:,} rows of width {teacher.width}.")
    if len(opened) == 1:
        return opened[0]
    from clipcid_cli.formats.embeddings.combined import CombinedEmbeddings

    combined = CombinedEmbeddings(opened, settings.teacher_weights, work)
    weights = ", ".join(f"{weight:.3g}" for weight in combined.weights)
    reporting.note(f"Teachers: {len(opened)}, joined by key to rows of width {combined.width}; weights {weights}.")
    for teacher, lacking in zip(opened, combined.lacking, strict=True):
        if lacking == combined.num_rows:
            first = next(file for file in combined.files if file.rows)
            compared = compare_keys(combined.keys_of(first)[0].as_py(), teacher)
            raise ClipcidError(
                f"{teacher.folder} has none of the {lacking:,} keys of {combined.folder}. {compared}",
                f"{advise_keys(teacher)}Give embeddings of the same data.",
            )
        if lacking:
            reporting.note(
                f"{teacher.folder} lacks {lacking:,} of the {combined.num_rows:,} keys of {combined.folder}."
            )
    silent = [str(teacher.folder) for teacher in opened if not teacher.has_texts]
    if silent and combined.has_texts:
        reporting.note(f"Without captions, and so with zeros in rows of texts: {', '.join(silent)}.")
    left = frozenset[Kind]().union(*(teacher.kinds for teacher in opened)) - combined.kinds
    if left:
        reporting.note(f"Not used, since not all teachers have the same: {', '.join(sorted(left))}.")
    return combined


def compare_keys(key: str, embeddings: Embeddings) -> str:
    """Show a key of the data beside one of embeddings, the same but for what was added to it if there is one."""
    other = ""
    for file in [file for file in embeddings.files if file.rows][:_FILES_COMPARED]:
        keys = embeddings.keys_of(file)
        alike = pc.indices_nonzero(pc.match_substring(keys, key))
        if len(alike):
            other = str(keys[alike[0].as_py()])
            break
        other = other or str(keys[0])
    return f"One of these keys is {key!r}, one of the embeddings' {other!r}."


def advise_keys(embeddings: Embeddings) -> str:
    """Return a remedy for keys of another tool that are not the data's; empty for those of `embed`."""
    if embeddings.sidecar is not None:
        return ""
    others = [name for name in embeddings.metadata_columns if name != embeddings.key_column]
    if not others:
        return "Write the data's keys into the column key of the metadata.\n"
    return f"Name the column of the metadata with the data's keys, --key-column NAME: {', '.join(others[:12])}.\n"


def skip_rows(embeddings: Embeddings, bad: npt.NDArray[np.int64], max_bad_fraction: float) -> Skips:
    """Count and name rows that cannot be used, given their numbers, ascending; too many of them are an error."""
    first = embeddings.take_column(embeddings.keys_of, bad[:NAMED])
    skips = Skips()
    if len(bad):
        skips = Skips({"nan_row": len(bad)}, {"nan_row": [key for piece in first for key in piece.to_pylist()]})
    skips.check(embeddings.num_rows, max_bad_fraction, str(embeddings.folder))
    if skips.total:
        reporting.warn(f"Rows skipped: {skips.total:,}\n{skips.describe()}")
    return skips


def list_bad_rows(embeddings: Embeddings, bad: npt.NDArray[np.int64]) -> Iterator[pa.Table]:
    """List rows that cannot be used, given their numbers, ascending: one file in memory at a time."""
    for file in embeddings.files:
        start, stop = np.searchsorted(bad, [file.first, file.first + file.rows])
        if start < stop:
            places = pa.array(bad[start:stop] - file.first)
            keys, shards = (
                read(file).take(places).combine_chunks() for read in (embeddings.keys_of, embeddings.shards_of)
            )
            yield list_rows(keys, shards, "nan_row")


@dataclasses.dataclass(frozen=True)
class ChosenKeepList:
    """A keep list, and how many of the images that it lists it keeps."""

    path: Path
    kept: int
    images: int
    samples: str  # what the step's samples are called in messages: ``rows`` or ``samples``
    max_missing: float  # largest fraction of them that the list may lack

    def describe(self) -> dict[str, Any]:
        """Return where it is and its counts as JSON values, for a sidecar."""
        return {"path": str(self.path), "kept": self.kept, "images": self.images}

    def report(self, source: str, total: int, *, kept: int, missing: int, key: str) -> None:
        """Report that it was taken; one that lacks too many of the step's samples was made from other data.

        `key` is one of the step's, for the error.
        """
        if missing > self.max_missing * total:
            how = f"lacks {missing:,} of the {total:,} {self.samples} of {source}"
            if 2 * missing > total:
                raise self._other_data(how, key)
            allowed = math.ceil(1000 * missing / total) / 1000
            raise ClipcidError(
                f"Keep list {self.path} {how}, more than the allowed {self.max_missing:.1%}.",
                f"If those are images that could not be used, allow them: --max-bad-fraction {allowed:g}. If the list is of "
                "other data, give another --keep-list, or --keep-list none.",
            )
        reporting.note(f"Keep list: {self.path}, {kept:,} of {total:,} {self.samples} kept.")

    def validate_related(self, keys: pa.Array, source: str) -> None:
        """Refuse a list that has none of some keys of `source`, n strings."""
        for listed, _ in parquet_listing(self.path).read():
            if pc.any(pc.is_in(listed, value_set=keys.cast(listed.type))).as_py():
                return
        raise self._other_data(f"has none of the {self.samples} of {source}", str(keys[0]))

    def _other_data(self, how: str, key: str) -> ClipcidError:
        listed = next((str(keys[0]) for keys, _ in parquet_listing(self.path).read() if len(keys)), "")
        return ClipcidError(
            f"Keep list {self.path} {how}: it was made from other data. One of its keys is {listed!r}, one of the "
            f"{self.samples} {key!r}.",
            "If these are the same images, make the list from embeddings with the data's keys (--key-column NAME). Or give "
            "the data or embeddings it was made from, another --keep-list, or --keep-list none to use all "
            f"{self.samples}.",
        )

    def find_kept(self, keys: Keys, count: int, folder: Path | None, source: str) -> npt.NDArray[np.bool_]:
        """Look up the N rows of `source` by their keys, all different, and report that the list was taken.

        A list in another order than the rows is joined with them in `folder`, see `join`.

        Returns:
            Which rows it keeps, bool [N]; those that it lacks are not kept.
        """
        kept_or_missing = join(keys, count, parquet_listing(self.path, "kept"), folder)[:, 0]
        kept = int(np.count_nonzero(kept_or_missing > 0))
        missing = int(np.count_nonzero(kept_or_missing < 0))
        first = next((str(column[0]) for column in keys() if len(column)), "")
        self.report(source, count, kept=kept, missing=missing, key=first)
        return kept_or_missing > 0


def choose_keep_list(
    option: str | None, work: WorkDirectory, samples: str, max_missing: float
) -> ChosenKeepList | None:
    """Choose the keep list of a step; None where all samples are to be used, which is reported.

    `option` is the value of ``--keep-list``: a file, ``none``, or None for the work directory's list where there is one.
    """
    path = work.find_keep_list() if option is None else Path(option)
    if path is None or option == NO_KEEP_LIST:
        reporting.note(f"Keep list: none, all {samples} are used.")
        return None
    keep_list = read_keep_list(path)
    return ChosenKeepList(path, keep_list.num_kept, len(keep_list), samples, max_missing)
