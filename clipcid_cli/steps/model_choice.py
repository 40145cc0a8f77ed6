"""The model that a command is to evaluate or export: the one that was named, or the newest student."""

from __future__ import annotations

from pathlib import Path

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.runtime.models.names import CONFIG_NAME, ModelName, parse_model, with_default_tag
from clipcid_cli.steps import reporting


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
