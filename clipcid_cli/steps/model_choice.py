"""Which model `eval-zeroshot`, `eval-linear` and `export` work on: the one that was named, else the newest student."""

from __future__ import annotations

from pathlib import Path

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.runtime.models.names import ModelName, parse_model, with_default_tag
from clipcid_cli.steps.reporting import Reporter


def choose_model(spec: str | None, work: Path, reporter: Reporter, *, positional_of: str | None = None) -> ModelName:
    """Resolve a model and report whatever the user did not spell out.

    Args:
        spec: The model as named on the command line; None takes the student of the run that finished last.
        positional_of: Subcommand whose first positional `spec` is. A path there that is no model is probably data, and the
            error then says so.
    """
    if spec is None:
        student = WorkDirectory(work).find_student()
        reporter.note(f"Model: {student}, the newest student of {work}.")
        return parse_model(str(student))
    try:
        name = with_default_tag(parse_model(spec))
    except ClipcidError as error:
        if positional_of is None or not Path(spec).exists() or (Path(spec) / "student").is_dir():
            raise
        raise ClipcidError(
            f"{error.message}\n{spec} was read as the model, because the first positional argument is the model.",
            f"Put the model first: clipcid {positional_of} MODEL {spec}",
        ) from error
    if name.spec != spec:
        reporter.note(f"Weights: {name.spec}.")
    return name
