"""Which model a command means, where its embeddings lie, and whether a recorded model is the one that is named."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from clipcid_cli.errors import ClipcidError, command_line
from clipcid_cli.formats.output import find_works
from clipcid_cli.formats.sidecar import read_sidecar, sidecar_path
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.records import ModelRecord
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
from clipcid_cli.steps.settings.shared import TrainingDataSettings
from clipcid_cli.typed import this_command

# The entries of a configuration's text tower that determine the tokens.
_TOKENS = ("context_length", "hf_tokenizer_name", "tokenizer_kwargs")


def choose_model(
    spec: str | None, work: Path, *, positional_of: str | None = None, is_before_data: bool = False
) -> ModelName:
    """Resolve a model to evaluate or export, and report whatever the user did not spell out.

    Args:
        spec: The model as named on the command line; None takes the student of the run that finished last.
        positional_of: Subcommand whose first positional `spec` is. What is no model there may be data, and the error then
            says so.
        is_before_data: Whether the one data set that the subcommand takes was given after it, so that it is none.
    """
    if spec is None:
        student = WorkDirectory(work).find_student()
        reporting.note(f"Model: {student}, the newest student of {work}.")
        return parse_model(str(student))
    try:
        name = with_default_tag(find_model(spec))
    except UnfinishedRunError:
        raise
    except ClipcidError as error:
        if positional_of is None or _is_of_model(Path(spec)):
            raise
        fix = f"Put the model first: {_with_model_first(positional_of, spec, work)}"
        if is_before_data:
            fix = error.fix
        elif not Path(spec).exists():
            fix = f"{error.fix}\nIf {spec} is the data: {fix[0].lower()}{fix[1:]}"
        raise ClipcidError(
            f"{error.message}\n{spec} was read as the model, because the first positional argument is the model.", fix
        ) from error
    if name.spec != spec:
        reporting.note(f"Weights: {name.spec}.")
    return name


def find_model(spec: str) -> ModelName:
    """Parse the name of a model as `parse_model` does; of what an unfinished run has yet to make, say that."""
    try:
        return parse_model(spec)
    except ClipcidError as error:
        run = _find_unfinished_run(Path(os.path.expanduser(spec.removeprefix("local-dir:"))))
        if run is None:
            raise
        from clipcid_cli.formats.results.run_folder import describe_progress  # only this error needs it

        raise UnfinishedRunError(
            f"The run {run} is unfinished{describe_progress(run)}, so it has no student yet.",
            "Run its command again, which finishes it.",
        ) from error


class UnfinishedRunError(ClipcidError):
    """A model was named that a run of `distill` has yet to make."""


def _find_unfinished_run(path: Path) -> Path | None:
    """Find the unfinished run, still without a student, whose folder a path names, or of whose students one."""
    run = path.parent if path.name in ("student", "student-ema") else path
    is_begun = run.is_dir() and bool(find_works(run, "distill"))
    has_student = (run / "student" / CONFIG_NAME).exists()
    return run if is_begun and not has_student and not sidecar_path(run, "distill").exists() else None


def _with_model_first(command: str, data: str, work: Path) -> str:
    """Return this run's command with a model before its data, the newest student where there is one."""
    model = "MODEL"
    with suppress(ClipcidError):
        model = str(WorkDirectory(work).find_student())
    words = this_command()
    if command not in words:
        return command_line(command, model, data)
    place = words.index(command) + 1
    return shlex.join([*words[:place], model, *words[place:]])


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
    from clipcid_cli.formats.embeddings.sidecar import EmbedSidecar

    recorded: ModelRecord | None = None
    with suppress(ClipcidError):  # damaged, or of an earlier version: told where it is read
        sidecar = read_sidecar(sidecar_path(folder, "embed"), EmbedSidecar)
        recorded = None if sidecar is None else sidecar.model
    if recorded is None or Path(recorded.spec).resolve() == name.path.resolve():
        return folder
    own = hash_weights(weights)
    return folder if recorded.weights_hash == own else folder.with_name(f"{folder.name}-{_shorten(own)}")


def find_embedded_model(work: WorkDirectory) -> str | None:
    """Return the model of the work directory's embeddings, when there are those of one model."""
    from clipcid_cli.formats.embeddings.sidecar import EmbedSidecar

    with suppress(ClipcidError):
        sidecar = read_sidecar(sidecar_path(work.find_embeddings(), "embed"), EmbedSidecar)
        return None if sidecar is None else sidecar.model.spec
    return None


def tell_apart(names: Sequence[ModelName]) -> list[ModelName]:
    """Let the name of a model folder end with the hash of its weights, where one before it has the same name."""
    first = dict[str, ModelName]()
    told_apart = list[ModelName]()
    for name in names:
        other = first.setdefault(name.slug, name)
        weights = None if name.path is None else find_weights(name.path)
        if other.path is not None and name.path is not None and other.path.resolve() != name.path.resolve() and weights:
            name = dataclasses.replace(name, suffix=f"-{_shorten(hash_weights(weights))}")
            reporting.note(f"{name.spec} is called {name.slug}, since {other.spec} has the same name.")
        told_apart.append(name)
    return told_apart


def _shorten(weights_hash: str) -> str:
    return weights_hash.rpartition(":")[2][:8]


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
