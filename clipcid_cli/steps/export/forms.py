"""The forms of an export, open_clip's folder, Hugging Face's and ONNX files: each is written, loaded again, and compared."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from clipcid_cli.algorithms.metrics.classification import class_weights
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.benchmark import DEFAULT_TEMPLATES
from clipcid_cli.formats.models.export_folder import (
    CLASSIFIER,
    HF_WEIGHTS,
    IMAGE_ENCODER,
    OPEN_CLIP_WEIGHTS,
    TEXT_ENCODER,
    TOKENIZER,
    TRANSFORMERS_JS,
    WEB,
    link_file,
    quantized_name,
)
from clipcid_cli.formats.models.export_sidecar import Parity
from clipcid_cli.formats.models.hf_folder import (
    EOS_ID,
    fits_tokenizer_file,
    hf_problems,
    validate_for_hf,
    write_hf_folder,
    write_hf_settings,
    write_tokenizer_file,
)
from clipcid_cli.formats.models.onnx_file import (
    DENSE_EMBEDS,
    IMAGE_EMBEDS,
    TEXT_EMBEDS,
    validate_for_classifier,
    write_classifier,
    write_onnx,
    write_quantized,
)
from clipcid_cli.formats.models.open_clip_folder import pixel_problems, square_side, write_model_folder
from clipcid_cli.formats.models.web_folder import write_page
from clipcid_cli.runtime.libraries import quiet_libraries
from clipcid_cli.runtime.models.clip_model import ClipModel
from clipcid_cli.runtime.models.exported import HfClip, OnnxSession, hf_towers, onnx_towers, read_tokens
from clipcid_cli.runtime.models.load import load_model
from clipcid_cli.runtime.models.names import parse_model
from clipcid_cli.runtime.models.tower_modules import (
    DenseImageTower,
    ImageTower,
    TextTower,
    has_patches,
    image_tower_kind,
)
from clipcid_cli.runtime.models.views import Renderer
from clipcid_cli.steps import reporting
from clipcid_cli.steps.export.card import export_name
from clipcid_cli.steps.export.check import (
    ACCURACY,
    SENTENCES,
    Checker,
    Classes,
    latency_of,
    open_towers,
    rate_of,
    run_timed,
)
from clipcid_cli.steps.settings.export import ExportSettings

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

_TOKENIZER_TEXTS = ["a photo of a cat.", "two DOGS & 3 birds — naïve café", "word " * 200]

# torchvision, with which transformers resizes, rounds its filter more coarsely than Pillow: at hard edges differences of 2
# of 255 levels were seen. A wrong filter or crop makes tens.
_MAX_LEVELS = 4.0

# What a page without classes begins with.
_EXAMPLE_LABELS = ("cat", "dog", "person", "house", "landscape", "food", "text")


def validate_forms(model: ClipModel, settings: ExportSettings) -> None:
    """Refuse, before anything is read or written, what one of the forms cannot express."""
    info = model.info
    if "hf" in settings.format:
        validate_for_hf(info.config, info.preprocess, info.tokenizer)
    if "onnx" in settings.forms and (problems := _transformers_js_problems(model)):
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


def _write_open_clip(checker: Checker, folder: Path) -> dict[str, Parity]:
    """Write a folder that open_clip loads as ``local-dir:``, load it again, and compare."""
    model = checker.model
    write_model_folder(
        folder,
        model.info.config,
        model.info.preprocess,
        _stored_tensors(checker),
        source=parse_model(model.info.spec).folder,
        tokenizer=model.tokenizer.whole,
    )
    written = load_model(parse_model(str(folder)), model.device)
    same_tokens = torch.equal(written.tokenizer(_TOKENIZER_TEXTS), model.tokenizer(_TOKENIZER_TEXTS))
    if not same_tokens or written.info.preprocess != model.info.preprocess:
        raise ClipcidError(
            f"open-clip: the written folder gives other {'pixels' if same_tokens else 'tokens'} than {model.info.spec}.",
            "Export from a folder that has the model's own preprocessing and tokenizer files.",
        )
    precision = checker.settings.stored_precision
    return {"open-clip": checker.check("open-clip", precision, open_towers(written), [folder / OPEN_CLIP_WEIGHTS])}


def _write_hf(checker: Checker, folder: Path) -> dict[str, Parity]:
    """Write a folder that transformers loads as ``CLIPModel`` and ``CLIPProcessor``, load it, and compare.

    Compared are rows of the same pixels and tokens, and the pixels and tokens that the folder's own processor makes.
    """
    model = checker.model
    tensors = _stored_tensors(checker)
    with quiet_libraries():
        write_hf_folder(folder, model.info.config, model.info.preprocess, tensors, model.tokenizer.whole)
    written = HfClip(folder)
    towers = hf_towers(written, checker.original, model)
    parity = checker.check("hf", checker.settings.stored_precision, towers, [folder / HF_WEIGHTS])
    parity.engine = written.engine
    parity.processor = _validate_processor(written, checker)
    parity.tokenizer = _validate_tokens("hf", written.prepare_texts, checker)
    return {"hf": parity}


def _stored_tensors(checker: Checker) -> dict[str, torch.Tensor]:
    """Return the state dict in the number format of the folder."""
    dtype = _DTYPES[checker.settings.stored_precision]
    return {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in checker.model.module.state_dict().items()
    }


def _validate_processor(written: HfClip, checker: Checker) -> dict[str, int | float]:
    """Compare pixels with open_clip's. transformers crops some images one pixel aside: these are counted and left out."""
    inputs, preprocess = checker.inputs, checker.model.info.preprocess
    std = torch.tensor(preprocess["std"]).view(3, 1, 1)
    side = square_side(preprocess["size"])
    assert side is not None, "or it would have been refused"
    largest = 0.0
    shifted = 0
    for image, pixels in zip(inputs.read_images(), inputs.pixels, strict=True):
        shorter, longer = sorted(image.size)
        # Of a longer side's margin of 3 modulo 4, transformers rounds half down, torchvision up.
        if preprocess["resize_mode"] == "shortest" and (side * longer // shorter - side) % 4 == 3:
            shifted += 1
            continue
        difference = written.prepare_image(image) - checker.model.normalize(pixels[None])
        largest = max(largest, float((difference.abs() * std * 255).max()))
    if largest > _MAX_LEVELS:
        raise ClipcidError(
            f"hf: the image processor's pixels differ from open_clip's by up to {largest:.1f} of 255 levels (allowed "
            f"{_MAX_LEVELS:.0f}).",
            "Report this with the model's preprocess_cfg; --format open-clip and onnx are not affected.",
        )
    return {
        "images": len(inputs.samples),
        "max_difference_levels": round(largest, 4),
        "cropped_one_pixel_aside": shifted,
    }


def _validate_tokens(form: str, tokenize: Callable[[list[str]], torch.Tensor], checker: Checker) -> dict[str, int]:
    """Compare the tokens of a written tokenizer with open_clip's.

    open_clip first cleans a text (curly quotes, HTML entities, broken encodings), which others do not: texts that this
    changes are counted, and must give the same tokens once they are cleaned.
    """
    candidates, tokenizer = checker.inputs.candidates, checker.model.tokenizer
    prompts = [text for texts in candidates.prompts for text in texts] if candidates is not None else []
    texts = list(dict.fromkeys([*_TOKENIZER_TEXTS, *SENTENCES, *checker.inputs.texts, *prompts]))
    mended = _find_different(texts, tokenizer(texts), tokenize(texts))
    if mended:
        cleaned = tokenize([tokenizer.whole.clean_fn(text) for text in mended])
        if different := _find_different(mended, tokenizer(mended), cleaned):
            raise ClipcidError(
                f"{form}: the tokenizer gives other tokens for {different[0][:60]!r} than open_clip's.",
                "Report this text; --format open-clip is not affected.",
            )
    return {"texts": len(texts), "same": len(texts) - len(mended), "same_once_mended": len(mended)}


def _find_different(texts: list[str], ours: torch.Tensor, theirs: torch.Tensor) -> list[str]:
    """Return the texts whose tokens differ before the end of the text; the text tower does not see the padding."""
    padding = (ours == EOS_ID).cumsum(dim=1) - (ours == EOS_ID).int() > 0
    same = ((ours == theirs) | padding).all(dim=1)
    return [text for text, equal in zip(texts, same.tolist(), strict=True) if not equal]


def _write_onnx_files(checker: Checker, folder: Path) -> dict[str, Parity]:
    """Write both encoders, and where there are classes a classifier, as ONNX files, run them with ONNX Runtime, and compare.

    The image encoder takes ``pixel_values``, the text encoder ``input_ids``; they give unit rows, ``image_embeds`` and
    ``text_embeds`` (Hugging Face's names). How pixels are made is in each file's metadata; `tokenizer.json` makes tokens.
    """
    classes = checker.inputs.classes
    kinds = ("fp32", *checker.settings.quantize)
    info = checker.model.info
    for_transformers_js = not _transformers_js_problems(checker.model)
    tokens = None
    with quiet_libraries():
        _write_encoders(checker, folder)
        if for_transformers_js and "hf" not in checker.settings.format:
            log_scale = math.log(checker.model.logit_scale)
            write_hf_settings(folder, info.config, info.preprocess, log_scale, checker.model.tokenizer.whole)
        if fits_tokenizer_file(checker.model.tokenizer.whole):
            write_tokenizer_file(folder, checker.model.tokenizer.whole)
            tokens = _validate_tokens("onnx", partial(read_tokens, folder / TOKENIZER), checker)
        for kind in checker.settings.quantize:
            for name in (IMAGE_ENCODER, TEXT_ENCODER):
                write_quantized(folder / name, folder / quantized_name(name, kind), kind)
    parity = {_form("onnx", kind): _validate_encoders(checker, folder, kind) for kind in kinds}
    parity["onnx"].tokenizer = tokens
    if classes is not None:
        parity |= _write_classifiers(checker, folder, classes)
    for ours, theirs in TRANSFORMERS_JS.items() if for_transformers_js else ():
        # It takes each as one file.
        if (folder / ours).exists() and not (folder / f"{ours}.data").exists():
            link_file(folder / ours, folder / theirs)
    return parity


def _transformers_js_problems(model: ClipModel) -> list[str]:
    info = model.info
    return hf_problems(info.config, info.preprocess, info.tokenizer)


def _form(name: str, kind: str) -> str:
    return name if kind == "fp32" else f"{name}-{kind}"


def _write_encoders(checker: Checker, folder: Path) -> None:
    model, opset = checker.model, checker.settings.onnx_opset
    assert opset is not None
    metadata = {
        "model": model.info.spec,
        "weights_hash": model.info.weights_hash,
        "preprocess": json.dumps(model.info.preprocess),
        "tokenizer": model.info.tokenizer,
        "context_length": str(model.info.context_length),
        "logit_scale": repr(model.logit_scale),
        "logit_bias": repr(model.logit_bias or 0.0),
        "output": "unit rows",
        "opset": str(opset),
    }
    tower: torch.nn.Module = ImageTower(model.module)
    outputs = [IMAGE_EMBEDS]
    if checker.settings.dense:
        tower = DenseImageTower(model.module)
        outputs.append(DENSE_EMBEDS)
        metadata[DENSE_EMBEDS] = "patches after the last block, final norm and projection; [N, h, w, D]; not unit rows"
    for name, module, example, gives in (
        (IMAGE_ENCODER, tower, model.normalize(checker.inputs.compared_pixels[:2]), outputs),
        (TEXT_ENCODER, TextTower(model.module), checker.inputs.tokens[:2], [TEXT_EMBEDS]),
    ):
        write_onnx(folder / name, module.eval(), example, gives, opset=opset, metadata=metadata)


def _validate_encoders(checker: Checker, folder: Path, kind: str) -> Parity:
    files = [folder / quantized_name(name, kind) for name in (IMAGE_ENCODER, TEXT_ENCODER)]
    image, text = (OnnxSession(path) for path in files)
    dense = DENSE_EMBEDS if checker.settings.dense else None
    towers = onnx_towers(image, text, checker.original, checker.model, dense)
    parity = checker.check(_form("onnx", kind), kind, towers, files, gated=kind != "fp32")
    parity.engine = image.engine
    parity.opset = checker.settings.onnx_opset
    return parity


def _write_classifiers(checker: Checker, folder: Path, classes: Classes) -> dict[str, Parity]:
    """Write a classifier from each image encoder, run it on whole images one by one, and compare it with PyTorch.

    ONNX Runtime resizes its pixels, Pillow the model's: that difference is part of what is measured.
    """
    model = checker.model
    inputs = checker.inputs
    render = Renderer(model.info.preprocess)
    weights = class_weights(checker.original.encode_prompts(classes.prompts()))

    def classify(image: Image.Image) -> torch.Tensor:
        return checker.original.images(torch.from_numpy(np.stack([render(image)]))) @ weights.T

    expected, pytorch_seconds = run_timed(classify, inputs.read_images())
    # Labels then index the classes of --classnames, which are the candidates of the encoders, too.
    labelled = inputs.candidates is not None and inputs.candidates.measure == ACCURACY
    parity = dict[str, Parity]()
    for kind in ("fp32", *checker.settings.quantize):
        encoder, path = (folder / quantized_name(name, kind) for name in (IMAGE_ENCODER, CLASSIFIER))
        write_classifier(path, encoder, weights.numpy(), classes.names, classes.templates)
        session = OnnxSession(path)
        images = (torch.from_numpy(np.array(image)[None]) for image in inputs.read_images())
        logits, seconds = run_timed(session, images)  # of its outputs the first
        cosines = (logits - (model.logit_bias or 0.0)) / model.logit_scale
        nearest = logits.argmax(dim=1)
        form = _form("classifier", kind)
        parity[form] = Parity(
            precision=kind,
            images=len(logits),
            max_cosine_difference=float((expected - cosines).abs().max()),
            agreement=float((expected.argmax(dim=1) == nearest).double().mean()),
            bytes=path.stat().st_size,
            images_per_second=rate_of(seconds),
            latency_ms=latency_of(seconds),
            pytorch_images_per_second=rate_of(pytorch_seconds),
            zeroshot=checker.compare_predictions(nearest, gated=kind != "fp32") if labelled else None,
            engine=session.engine,
        )
        checker.validate(form, parity[form])
    return parity


def _write_web(checker: Checker, folder: Path) -> dict[str, Parity]:
    """Write the page, which runs the smallest encoders; they are compared already, and get a second name in its folder."""
    model, classes = checker.model, checker.inputs.classes
    names = page_encoders(checker.settings)
    if too_large := [name for name in names if (folder / f"{name}.data").exists()]:
        raise ClipcidError(
            f"--format web: {', '.join(too_large)} is above 2 GB, more than a browser loads.", "Add --quantize int8."
        )
    for name in (*names, TOKENIZER):
        link_file(folder / name, folder / WEB / name)
    labels, templates = (_EXAMPLE_LABELS, DEFAULT_TEMPLATES) if classes is None else (classes.names, classes.templates)
    write_page(
        folder / WEB,
        describe_for_page(model),
        [folder / WEB / name for name in names],
        labels,
        templates,
        search=checker.settings.search_images is not None,
    )
    return {}


def smallest_kind(settings: ExportSettings) -> str:
    """Return the number format of the encoders that the page loads."""
    return next(kind for kind in ("int8", "fp16", "fp32") if kind in ("fp32", *settings.quantize))


def page_encoders(settings: ExportSettings) -> list[str]:
    """Name the image and the text encoder that the page loads."""
    return [quantized_name(name, smallest_kind(settings)) for name in (IMAGE_ENCODER, TEXT_ENCODER)]


def describe_for_page(model: ClipModel) -> dict[str, Any]:
    """Return what the page must know of a model: see `write_page`."""
    preprocess = model.info.preprocess
    return {
        "name": export_name(parse_model(model.info.spec)),
        "width": model.info.embed_dim,
        "logit_scale": model.logit_scale,
        "canonical": model.tokenizer.whole.clean_fn("A.") == "a",
        "side": square_side(preprocess["size"]),
        **{name: preprocess[name] for name in ("mean", "std", "interpolation", "resize_mode")},
    }


# Each writes the files of a format, loads them, and compares what they compute with the original: entries of parity.json.
WRITERS = {"open-clip": _write_open_clip, "hf": _write_hf, "onnx": _write_onnx_files, "web": _write_web}
# What they need of the extra `export`.
PACKAGES = {
    "open-clip": (),
    "hf": ("transformers",),
    "onnx": ("onnx", "onnxscript", "onnxruntime", "transformers"),
    "web": (),
}
