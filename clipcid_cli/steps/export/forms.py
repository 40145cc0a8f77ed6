"""The forms of an export: what each can express, which function writes it, and which packages that needs."""

from __future__ import annotations

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.models.hf_folder import fits_tokenizer_file, validate_for_hf
from clipcid_cli.formats.models.onnx_file import validate_for_classifier
from clipcid_cli.formats.models.open_clip_folder import pixel_problems
from clipcid_cli.runtime.models.clip_model import ClipModel
from clipcid_cli.runtime.models.tower_modules import has_patches, image_tower_kind
from clipcid_cli.steps import reporting
from clipcid_cli.steps.export.executorch_files import write_executorch_files
from clipcid_cli.steps.export.folders import write_hf, write_open_clip
from clipcid_cli.steps.export.onnx_files import transformers_js_problems, write_onnx_files
from clipcid_cli.steps.export.web import write_web
from clipcid_cli.steps.settings.export import ExportSettings


def validate_forms(model: ClipModel, settings: ExportSettings) -> None:
    """Refuse, before anything is read or written, what one of the forms cannot express."""
    info = model.info
    if "hf" in settings.format:
        validate_for_hf(info.config, info.preprocess, info.tokenizer, model.module)
        if not fits_tokenizer_file(model.tokenizer.whole):
            raise ClipcidError(
                f"--format hf: tokenizer.json cannot express the tokenizer of {info.spec}, {info.tokenizer}.",
                "Export it with --format open-clip or onnx.",
            )
    if "onnx" in settings.forms and (problems := transformers_js_problems(model, settings)):
        reporting.note(f"onnx/, which transformers.js reads, is left out: {'; '.join(problems)}.")
    if "web" in settings.format:
        problems = pixel_problems(info.preprocess)
        if not fits_tokenizer_file(model.tokenizer.whole):
            problems.append(f"tokenizer.json cannot express its tokenizer, {info.tokenizer}")
        if problems:
            raise ClipcidError(
                f"--format web: the page cannot do what {info.spec} needs: {'; '.join(problems)}.",
                "Export it with --format onnx, and prepare its inputs as the metadata say.",
            )
    if settings.dense and not has_patches(model.module):
        raise ClipcidError(
            f"--dense: the image tower of {info.spec} is not a ViT of open_clip whose patches share the space of its "
            f"images ({image_tower_kind(model.module)}).",
            "Omit --dense.",
        )
    if settings.classnames is not None:
        validate_for_classifier(info.preprocess)


# Each writes the files of a format, loads them, and compares what they compute with the original: entries of parity.json.
WRITERS = {
    "open-clip": write_open_clip,
    "hf": write_hf,
    "onnx": write_onnx_files,
    "executorch": write_executorch_files,
    "web": write_web,
}
# What they need of an extra: of `executorch` that one, the others of `export`.
PACKAGES = {
    "open-clip": (),
    "hf": ("transformers",),
    "onnx": ("onnx", "onnxscript", "onnxruntime", "transformers"),
    "executorch": ("executorch", "torchao", "transformers"),
    "web": (),
}
