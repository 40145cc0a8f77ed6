"""Breaking text into lines for a terminal: never inside a name, and command lines so that they can still be copied."""

from __future__ import annotations

import re

_PART = r"""'[^']*'|"(?:\\.|[^"\\])*"|\\.|[^\s'"\\]"""  # of a word, as a shell reads it
_WORD = re.compile(rf"(?:{_PART}|\S)+")
_FLAG = re.compile(r"--?[A-Za-z]")
# A command line, or a flag with its value, that ends a sentence: "Give --embeddings, or run: clipcid embed DATA".
_COMMAND = re.compile(rf"(?P<before>.*:) (?P<command>(?:clipcid|torchrun) .*|--[a-z-]+ (?:{_PART})+)")


def wrap(text: str, width: int) -> str:
    """Break each line of a text that is wider than `width`, keeping its indentation.

    Lines end between words; a path that is too long for a line, after a slash. A longer word stays whole.
    """
    return "\n".join(_wrap_line(line, width) for line in text.split("\n"))


def wrap_command(command: str, width: int) -> str:
    r"""Break a command line before its flags with a trailing ``\``, as a shell reads it."""
    parts: list[str] = []
    for word in _WORD.findall(command):
        if _FLAG.match(word) or not parts:
            parts.append(word)
        else:
            parts[-1] += f" {word}"
    lines = parts[:1]
    for flag in parts[1:]:
        if len(lines[-1]) + 1 + len(flag) + 2 > width:
            lines[-1] += " \\"
            lines.append(f"    {flag}")
        else:
            lines[-1] += f" {flag}"
    return "\n".join(lines)


def _wrap_line(line: str, width: int) -> str:
    if len(line) <= width:
        return line
    found = _COMMAND.fullmatch(line)
    if found is not None:
        command = wrap_command(found["command"], width - 2).replace("\n", "\n  ")
        return f"{_wrap_line(found['before'], width)}\n  {command}"
    indent = " " * (len(line) - len(line.lstrip()))
    lines = [indent]
    for word in line.split():
        parts = [word] if len(indent + word) <= width else re.split(r"(?<=/)(?=.)", word)
        for index, part in enumerate(parts):
            space = "" if index or lines[-1] == indent else " "
            if len(lines[-1] + space + part) <= width or lines[-1] == indent:
                lines[-1] += space + part
            else:
                lines.append(indent + part)
    return "\n".join(lines)
