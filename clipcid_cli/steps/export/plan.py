"""Which model is exported, and where to: what is known to fail is refused before the model is loaded."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.fingerprint import validate_unchanged
from clipcid_cli.formats.models.export_folder import validate_export_folder
from clipcid_cli.formats.models.web_folder import validate_packages
from clipcid_cli.formats.output import is_claimed
from clipcid_cli.formats.results.run_folder import DistillSidecar, RunFolder
from clipcid_cli.formats.sidecar import read_sidecar, sidecar_path
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.runtime.models.names import ModelName, parse_model
from clipcid_cli.steps import reporting
from clipcid_cli.steps.export.card import export_name
from clipcid_cli.steps.export.forms import PACKAGES
from clipcid_cli.steps.models import choose_model
from clipcid_cli.steps.settings.export import ExportSettings


def plan_export(settings: ExportSettings) -> tuple[ModelName, Path]:
    """Find the model and the folder of its export, and refuse what is known to fail before the model is loaded."""
    source = choose_model(settings.model, settings.work)
    if settings.ema:
        source = _find_average(source)
    folder = settings.out or WorkDirectory(settings.work).export(export_name(source))
    for form in settings.forms:
        missing = [name for name in PACKAGES[form] if importlib.util.find_spec(name) is None]
        if missing:
            raise ClipcidError(
                f"--format {form} needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed.",
                "Install them, in the checkout of clipcid: "
                f"pip install '.[{'executorch' if form == 'executorch' else 'export'}]'",
            )
    if source.path is not None and folder.resolve() == source.path.resolve():
        raise ClipcidError(
            f"Model {source.spec} is the folder {folder}, so its export would overwrite it.",
            "Give another folder with --out.",
        )
    if "web" in settings.format:
        validate_packages(settings.npm_packages)
    validate_export_folder(folder, overwrite=settings.overwrite)
    if settings.push is not None:
        from clipcid_cli.steps.export.push import validate_push

        validate_push(settings.push)
    return source, folder


def _find_average(student: ModelName) -> ModelName:
    """Find the model with averaged weights of a student's run."""
    fix = "Train with clipcid distill --ema DECAY, such as 0.999, or omit --ema."
    if student.path is None or not is_claimed(student.path.resolve().parent, "distill"):
        raise ClipcidError(
            f"--ema: {student.spec} is no student of clipcid distill, so there is no average of it.", fix
        )
    run = RunFolder(student.path.resolve().parent)
    path = sidecar_path(run.path, "distill")
    sidecar = read_sidecar(path, DistillSidecar)
    if sidecar is None:
        raise ClipcidError(f"--ema: the run in {run.path} is unfinished.", "Run its command again, which finishes it.")
    if sidecar.made.ema is None:
        raise ClipcidError(f"--ema: the run in {run.path} kept no average of the weights.", fix)
    validate_unchanged(
        run.path,
        sidecar.outputs,
        path,
        f"Use the model as it is now, by its path: {run.student_ema}; or train it again: its command, with --overwrite.",
    )
    average = run.student_ema
    if average.is_relative_to(Path.cwd()):
        average = average.relative_to(Path.cwd())
    reporting.note(f"Average of the weights: {average}, decay {sidecar.made.ema}.")
    return parse_model(str(average))
