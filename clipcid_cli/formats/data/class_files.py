"""Text files of class names and of prompt templates, one per line."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.reading import read_regular, reading

# Placeholders of the class name: CLIP_benchmark writes {c}, open_clip {}.
PLACEHOLDERS = ("{c}", "{}")
# Names accepted in place of a file: open_clip's lists (see `runtime.models.clip_model`).
BUILTIN_TEMPLATES = ("openai", "simple")
BUILTIN_CLASS_NAMES = ("imagenet",)
DEFAULT_TEMPLATES = ("a photo of a {c}.",)


def read_class_names(path: Path) -> tuple[str, ...]:
    """Read class names, one per line; the number of the line, from 0, is the label."""
    return _read_lines(path, "class name")


def read_templates(path: Path) -> tuple[str, ...]:
    """Read prompt templates, one per line, each with ``{c}`` or ``{}`` for the class name."""
    templates = _read_lines(path, "template")
    for number, template in enumerate(templates, start=1):
        if not any(placeholder in template for placeholder in PLACEHOLDERS):
            raise ClipcidError(
                f"{path}, line {number}: {template!r} has no placeholder for the class name.",
                "Write {c} (as CLIP_benchmark does) or {} where it goes.",
            )
    return templates


def fill_template(template: str, class_name: str) -> str:
    """Insert a class name into a template. Other braces stay: a template is text, never a format string."""
    for placeholder in PLACEHOLDERS:
        template = template.replace(placeholder, class_name)
    return template


def hash_lines(lines: Iterable[str]) -> str:
    """Return what ``b2sum -l 48 FILE`` prints of a file with these lines."""
    text = "".join(f"{line}\n" for line in lines)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def _read_lines(path: Path, what: str) -> tuple[str, ...]:
    with reading(path, "UTF-8 text", f"Give a text file with one {what} per line."):
        text = read_regular(path).decode("utf-8-sig")
    lines = [line.strip() for line in text.rstrip().splitlines()]
    if not lines:
        raise ClipcidError(f"{path} contains no {what}.", f"Write one {what} per line.")
    if "" in lines:
        raise ClipcidError(
            f"{path}, line {lines.index('') + 1} is empty, with more lines after it.",
            f"Write one {what} per line; an empty line would shift the ones after it.",
        )
    return tuple(lines)
