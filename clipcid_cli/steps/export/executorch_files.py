"""The ExecuTorch programs of an export, both encoders in several number formats: written, run, and compared."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

from clipcid_cli.formats.files import write_json
from clipcid_cli.formats.models.executorch_file import write_program
from clipcid_cli.formats.models.export_folder import (
    ENCODERS,
    IMAGE_PROGRAM,
    TEXT_PROGRAM,
    TOKENIZER,
    quantized_name,
)
from clipcid_cli.formats.models.export_sidecar import Parity
from clipcid_cli.formats.models.hf_folder import fits_tokenizer_file, write_tokenizer_file
from clipcid_cli.runtime.libraries import quiet_libraries
from clipcid_cli.runtime.models.exported import ExecutorchProgram, read_tokens
from clipcid_cli.runtime.models.tower_modules import ImageTower, TextTower
from clipcid_cli.steps.export.check import Checker
from clipcid_cli.steps.export.metadata import describe_encoders
from clipcid_cli.steps.export.tokens import compare_tokens


def write_executorch_files(checker: Checker, folder: Path) -> dict[str, Parity]:
    """Write both encoders as programs, run them with ExecuTorch's own runtime, and compare.

    Each takes one image or text as the ONNX encoders do; how they are made is in `encoders.json` and `tokenizer.json`.
    """
    model, tokenizer = checker.model, checker.model.tokenizer.whole
    kinds = ("fp32", *checker.settings.quantize)
    image, text = ImageTower(model.module).eval(), TextTower(model.module).eval()
    pixels = model.normalize(checker.inputs.compared_pixels[:1])
    write_json(folder / ENCODERS, describe_encoders(model))
    parity = dict[str, Parity]()
    with quiet_libraries():
        for kind in kinds:
            write_program(folder / quantized_name(IMAGE_PROGRAM, kind), image, pixels, kind)
            write_program(folder / quantized_name(TEXT_PROGRAM, kind), text, checker.inputs.tokens[:1], kind)
            name = "executorch" if kind == "fp32" else f"executorch-{kind}"
            parity[name] = _check(name, kind, checker, folder)
        if fits_tokenizer_file(tokenizer):
            write_tokenizer_file(folder, tokenizer)
            parity["executorch"].tokenizer = compare_tokens(
                "executorch", partial(read_tokens, folder / TOKENIZER), checker
            )
    return parity


def _check(name: str, kind: str, checker: Checker, folder: Path) -> Parity:
    files = [folder / quantized_name(program, kind) for program in (IMAGE_PROGRAM, TEXT_PROGRAM)]
    image, text = (ExecutorchProgram(path) for path in files)
    towers = dataclasses.replace(
        checker.original,
        images=lambda pixels: image(checker.model.normalize(pixels)),
        texts=text,
        dense=None,
    )
    parity = checker.check(name, kind, towers, files, gated=kind != "fp32")
    parity.engine = image.engine
    return parity
