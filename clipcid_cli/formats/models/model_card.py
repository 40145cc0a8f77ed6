"""A model card: the README.md of an export, with the header Hugging Face reads."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from clipcid_cli import __version__
from clipcid_cli.formats.models.export_folder import CONTENT

UNKNOWN = "unknown"


@dataclasses.dataclass(frozen=True)
class ModelCard:
    """What is known about an exported model. A fact that no file states is `UNKNOWN`.

    Attributes:
        library: Library that reads the main format: ``open_clip``, ``transformers`` or ``onnx``.
        metrics: (data set, task, metric, value, hashes of class names and templates) of each measurement of the original
            model.
        parity: Entry ``parity`` of `parity.json`.
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
    """Write a model card in Markdown; `files` are the names of those next to it."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("clipcid_cli.formats"), trim_blocks=True, lstrip_blocks=True
    )
    environment.globals |= {"row": _as_row, "text": _as_text, "yaml": _as_yaml}
    template = environment.get_template("model_card.jinja")
    return template.render(card=card, files=files, content=CONTENT, version=__version__).strip() + "\n"


def _as_row(*cells: str) -> str:
    return "| " + " | ".join(_as_text(cell).replace("|", "\\|") for cell in cells) + " |"


def _as_text(words: str) -> str:
    """Return words that Markdown shows on one line as they are: a name must not become a tag of the page."""
    return " ".join(words.replace("<", "&lt;").splitlines())


def _as_yaml(words: str) -> str:
    return json.dumps(words, ensure_ascii=False).replace("<", "\\u003c")  # which YAML reads as <
