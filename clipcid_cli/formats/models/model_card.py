"""A model card: the README.md of an export, with the header Hugging Face reads."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from clipcid_cli import __version__
from clipcid_cli.formats.models.export_folder import CLASSIFIER, IMAGE_ENCODER, PARITY, TEXT_ENCODER
from clipcid_cli.formats.models.hf_folder import HF_CONFIG, HF_PREPROCESSOR, HF_WEIGHTS
from clipcid_cli.formats.models.open_clip_folder import CONFIG_NAME, WEIGHTS_NAME

UNKNOWN = "unknown"

_CONTENT = {
    CONFIG_NAME: "architecture and preprocessing, as open_clip reads them",
    WEIGHTS_NAME: "weights, as open_clip reads them",
    HF_CONFIG: "architecture, as transformers reads it",
    HF_WEIGHTS: "weights, as transformers reads them",
    HF_PREPROCESSOR: "preprocessing, as transformers reads it",
    "tokenizer.json": "CLIP's byte-pair encoding",
    IMAGE_ENCODER: "prepared pixels to unit rows",
    TEXT_ENCODER: "tokens to unit rows",
    CLASSIFIER: "bytes of images of any size to one score per class; class names are in its metadata",
    PARITY: "how each export was compared with the original",
}

_METRICS = ("data", "task", "metric", "value", "class names, templates")
_OPEN_CLIP = """```python
import open_clip
model, _, preprocess = open_clip.create_model_and_transforms("local-dir:FOLDER")
tokenizer = open_clip.get_tokenizer("local-dir:FOLDER")
```"""
_HF = """```python
from transformers import CLIPModel, CLIPProcessor
model, processor = CLIPModel.from_pretrained("FOLDER"), CLIPProcessor.from_pretrained("FOLDER")
```

transformers does not clean texts as open_clip does (curly quotes, HTML entities, broken encodings: `ftfy.fix_text` and
`html.unescape` do), and shifts the crop of some images by one pixel; `parity.json` counts both."""
_CLASSIFIER = """```python
import json, numpy, onnxruntime
from PIL import Image
session = onnxruntime.InferenceSession("classifier.onnx")
names = json.loads(session.get_modelmeta().custom_metadata_map["class_names"])
photo = Image.open("photo.jpg").convert("RGBA")
image = Image.new("RGB", photo.size, "white")
image.paste(photo, mask=photo)  # transparent areas become white, as in clipcid
logits, probabilities = session.run(["logits", "probabilities"], {"image": numpy.asarray(image)[None]})
print(names[probabilities[0].argmax()], probabilities[0].max())
```"""
_DENSE = """`dense_embeds` of `image_encoder.onnx`, [N, h, w, D], holds each patch after the last block, the final norm and
the projection, not of unit length; row 0 is the top. With open_clip:

```python
found = model.visual.forward_intermediates(pixels, indices=1, normalize_intermediates=True, output_fmt="NLC")
dense = found["image_intermediates"][-1] @ model.visual.proj  # [N, h * w, D]
```"""


@dataclasses.dataclass(frozen=True)
class ModelCard:
    """What is known about an exported model. A fact that no file states is `UNKNOWN`.

    Attributes:
        library: Library that reads the main format: ``open_clip``, ``transformers`` or ``onnx``.
        facts: What it is and how it was made, by name.
        metrics: (data set, task, metric, value, hashes of class names and templates) of each measurement of the original
            model.
        precision: Number format of the stored weights of folders.
        parity: Entry ``parity`` of `parity.json`.
        dense: Whether the ONNX image encoder returns patches.
    """

    name: str
    license: str
    library: str
    facts: Mapping[str, str]
    metrics: Sequence[tuple[str, str, str, float, str]]
    precision: str
    parity: Mapping[str, Any]
    dense: bool


def render_card(card: ModelCard, files: Sequence[str]) -> str:
    """Write a model card in Markdown.

    Args:
        files: Names of the files next to it.
    """
    header = [
        "---",
        "license: " + json.dumps(card.license, ensure_ascii=False).replace("<", "\\u003c"),  # which YAML reads as <
        f"library_name: {card.library}",
        "pipeline_tag: zero-shot-image-classification",
        "tags: [clip, clipcid]",
        "---",
    ]
    metrics = [[*names, f"{value:.4f}", prompts] for *names, value, prompts in card.metrics]
    sections = [
        "\n".join(header),
        f"# {_as_text(card.name)}",
        f"A CLIP model, exported by clipcid {__version__}. Facts that no file of the work directory states are {UNKNOWN}.",
        _table(["", ""], [[name, value] for name, value in card.facts.items()]),
        "## Metrics",
        *([_explain_metrics(card.precision), _table(_METRICS, metrics)] if metrics else []),
        *([] if metrics else [f"{UNKNOWN.capitalize()}."]),
        "## Files",
        _table(["file", "content"], [[f"`{name}`", what] for name in files if (what := _describe(name))]),
        "## How it was checked",
        "Each export was compared with the original in PyTorch before it was moved here; `parity.json` has all results.",
        _table(["export", "smallest cosine", "same predictions", "MB", "images/s"], list(_parity_rows(card.parity))),
        "## Use",
        *_uses(files, card.dense),
    ]
    return "\n\n".join(sections) + "\n"


def _explain_metrics(precision: str) -> str:
    other = "" if precision == "fp32" else f", not on the {precision} weights here"
    measured = (
        f"Measured on the original model{other}; 'How it was checked' below shows how close each export is to it."
    )
    return f"{measured} Scores of class names or templates with other hashes are not comparable."


def _describe(name: str) -> str | None:
    for kind, words in (("_fp16", "16-bit"), ("_int8", "8-bit")):
        if f"{kind}.onnx" in name:
            whole = _CONTENT.get(name.replace(kind, ""))
            return f"{whole}; {words} weights" if whole else None
    return _CONTENT.get(name)


def _parity_rows(parity: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for name, values in parity.items():
        cosines = [
            tower["min_cosine"] for tower in values.values() if isinstance(tower, dict) and "min_cosine" in tower
        ]
        zeroshot = values.get("zeroshot")
        agreement = zeroshot["agreement"] if zeroshot else values.get("agreement")
        rows.append(
            [
                name,
                f"{min(cosines):.7f}" if cosines else "",
                f"{100 * agreement:.1f} %" if agreement is not None else "",
                f"{values['bytes'] / 1e6:.1f}",
                f"{values['images_per_second']:,.0f}",
            ]
        )
    return rows


def _uses(files: Sequence[str], dense: bool) -> list[str]:
    uses = []
    if CONFIG_NAME in files:
        uses.append(_OPEN_CLIP)
    if HF_CONFIG in files:
        uses.append(_HF)
    if CLASSIFIER in files:
        uses.append(_CLASSIFIER)
    if IMAGE_ENCODER in files:
        uses.append("The metadata of the ONNX encoders say how pixels and tokens are prepared.")
    if dense:
        uses.append(_DENSE)
    return uses


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [list(head), ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_as_text(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _as_text(words: str) -> str:
    """Return words that Markdown shows on one line as they are: a name must not become a tag of the page."""
    return " ".join(words.replace("<", "&lt;").splitlines())
