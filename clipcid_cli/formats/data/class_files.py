"""Text files that say what the classes are called and how to ask for them: one class name, or one template, a line."""

from __future__ import annotations

from pathlib import Path

from clipcid_cli.errors import ClipcidError

# Where the class name goes: CLIP_benchmark writes {c}, open_clip {}.
PLACEHOLDERS = ("{c}", "{}")
# What may be named instead of a file: open_clip's lists (see `runtime.encoder`).
BUILTIN_TEMPLATES = ("openai", "simple")
BUILTIN_CLASS_NAMES = ("imagenet",)
DEFAULT_TEMPLATES = ("a photo of a {c}.",)


def read_class_names(path: Path) -> tuple[str, ...]:
    """Read class names, one a line; the number of the line, from 0, is the label.

    Raises:
        ClipcidError: when the file cannot be read, holds no name, or has an empty line between names, which would shift
            every label after it.
    """
    return _read_lines(path, "class name")


def read_templates(path: Path) -> tuple[str, ...]:
    """Read prompt templates, one a line, each with ``{c}`` or ``{}`` where the class name goes.

    Raises:
        ClipcidError: when the file cannot be read, holds no template, or a line has no place for the class name.
    """
    templates = _read_lines(path, "template")
    for number, template in enumerate(templates, start=1):
        if not any(placeholder in template for placeholder in PLACEHOLDERS):
            raise ClipcidError(
                f"{path}, line {number}: {template!r} has no place for the class name.",
                "Write {c} (as CLIP_benchmark does) or {} where it goes.",
            )
    return templates


def fill_template(template: str, class_name: str) -> str:
    """Put a class name into a template. Other braces stay as they are: a template is text, never a format string."""
    for placeholder in PLACEHOLDERS:
        template = template.replace(placeholder, class_name)
    return template


def _read_lines(path: Path, what: str) -> tuple[str, ...]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ClipcidError(
            f"{path} cannot be read: {error.strerror}.", f"Give a text file with one {what} a line."
        ) from error
    except UnicodeDecodeError as error:
        raise ClipcidError(f"{path} is not UTF-8 text.", f"Give a text file with one {what} a line.") from error
    lines = [line.strip() for line in text.splitlines()]
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise ClipcidError(f"{path} holds no {what}.", f"Write one {what} a line.")
    if "" in lines:
        raise ClipcidError(
            f"{path}, line {lines.index('') + 1} is empty, with more lines after it.",
            f"Write one {what} a line; an empty line would shift the ones after it.",
        )
    return tuple(lines)
