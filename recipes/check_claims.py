"""Check the documents' figures against the logs they come from: python recipes/check_claims.py [--write].

A comment above a table says where its figures come from:

    <!-- figures: NAME -->      document_tables.py makes the whole table from a log; --write puts it into the document
    <!-- figures in: PATH -->   every number of the table is in that document

A table of figures without one is an error, unless its section or the head of its document says that there is no log, or
that they are computed. An
interval in the text of a recipe must be in one of the tables made from logs.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from document_tables import FILES, TABLES

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("README.md", "clipcid_cli/docs/*.md", "recipes/**/*.md")
# The texts whose intervals are looked up in the tables of their recipe.
TEXTS = {
    "recipes/ablation/README.md": "recipes/ablation/",
    "recipes/claim/README.md": "recipes/claim/",
    "clipcid_cli/docs/distill.md": "recipes/ablation/",
}
MADE = re.compile(r"<!-- figures: (\w+) -->")
COPIED = re.compile(r"<!-- figures in: (\S+) -->")
NO_LOG = re.compile(r"\b(?:no log|computed)\b", re.IGNORECASE)
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")
# A cell that is a figure: a number with a unit, an interval or another number, but no words.
FIGURE = re.compile(r"\**[+−-]?\d[\d,.:]*(?:[^A-Za-z]|\b(?:to|and|of|one seed)\b)*\**")
INTERVAL = re.compile(r"([+−-]?\d+\.\d)(?: points)?(?: \(|, | \[)([+−-]?\d+\.\d)…([+−-]?\d+\.\d)")
# Of the filled cells beside the first column.
LEAST_SHARE = 0.5


class Document:
    """A document's lines, and the tables in them."""

    def __init__(self, name: str, text: str) -> None:
        self.name, self.lines = name, text.splitlines()

    def tables(self) -> Iterator[tuple[int, int]]:
        """Yield the first line of each table and the first one after it."""
        start = None
        for number, line in enumerate([*self.lines, ""]):
            if start is None and line.startswith("|"):
                start = number
            elif start is not None and not line.startswith("|"):
                yield start, number
                start = None

    def above(self, start: int) -> str:
        """Return the line above a table, blank ones left out."""
        return next((line for line in reversed(self.lines[:start]) if line.strip()), "")

    def says_no_log(self, line: int) -> bool:
        """Tell whether the head of the document, a line's own paragraph or its section's first says that there is no log."""
        end_of_head = next((number for number, text in enumerate(self.lines) if text.startswith("## ")), line)
        section = max((number for number, text in enumerate(self.lines[:line]) if text.startswith("#")), default=0)
        paragraphs = [(first, text) for first, text in self.paragraphs() if first <= line]
        head = [text for first, text in paragraphs if first < end_of_head]
        here = [text for first, text in paragraphs if first > section]
        return any(NO_LOG.search(text) for text in (*head, *here[:1], *here[-1:]))

    def paragraphs(self) -> Iterator[tuple[int, str]]:
        """Yield the first line and the text of each paragraph and list item; tables, headings and comments are none."""
        start, parts = 0, list[str]()
        for number, line in enumerate([*self.lines, ""]):
            is_text = bool(line.strip()) and line[0] not in "|#<"
            if parts and (not is_text or line.startswith("- ")):
                yield start, " ".join(parts)
                parts = []
            if is_text:
                start = start if parts else number
                parts.append(line)


def cells_of(line: str) -> list[str]:
    """Return the cells of a table's line."""
    return [cell.strip() for cell in line.strip("|").split("|")]


def is_of_figures(lines: list[str]) -> bool:
    """Tell whether a table is one of figures."""
    filled = [cell for line in lines[2:] for cell in cells_of(line)[1:] if cell]
    return bool(filled) and sum(FIGURE.fullmatch(cell) is not None for cell in filled) >= LEAST_SHARE * len(filled)


def check(document: Document, others: dict[str, str]) -> Iterator[str]:
    """Yield what is wrong with the tables of a document."""
    for start, end in document.tables():
        lines, above, place = document.lines[start:end], document.above(start), f"{document.name}:{start + 1}"
        if made := MADE.fullmatch(above):
            yield from differences(place, lines, made[1])
        elif copied := COPIED.fullmatch(above):
            there = numbers_in(others[copied[1]])
            missing = sorted(numbers_in("\n".join(lines[2:])) - there)
            if missing:
                yield f"{place}: not in {copied[1]}: {', '.join(missing)}"
        elif is_of_figures(lines) and not document.says_no_log(start):
            yield f"{place}: a table of figures without a log. Name one above it, or say that there is no log."


def numbers_in(text: str) -> set[str]:
    """Return the numbers of a text, without the commas between thousands."""
    return {number.replace(",", "") for number in NUMBER.findall(text)}


def differences(place: str, lines: list[str], name: str) -> Iterator[str]:
    """Yield the lines in which a table differs from what its log says."""
    if name not in TABLES:
        yield f"{place}: document_tables.py has no {name}"
        return
    expected = TABLES[name]()
    if len(expected) != len(lines):
        yield f"{place}: {len(lines)} lines, but the log gives {len(expected)}"
    for number, (line, right) in enumerate(zip(lines, expected, strict=False)):
        if line != right:
            yield f"{place}, line {number + 1} of the table:\n  is      {line}\n  log has {right}"


def check_file(name: str, text: str) -> Iterator[str]:
    """Yield the first line in which a file of tables differs from what its log says."""
    lines, expected = (part.rstrip("\n").splitlines() for part in (text, "\n".join(FILES[name]())))
    for number, (line, right) in enumerate(zip(lines, expected, strict=False), 1):
        if line != right:
            yield f"{name}:{number}:\n  is      {line}\n  log has {right}"
            return
    if len(lines) != len(expected):
        yield f"{name}: {len(lines)} lines, but the log gives {len(expected)}"


def check_intervals(document: Document, tables: str) -> Iterator[str]:
    """Yield the intervals of a text that are in none of the tables, with either sign; where there is no log, none."""
    known = set(intervals_of(tables))
    text = "\n".join(document.lines)
    for found in INTERVAL.finditer(text):
        mean, low, high = numbers(found)
        line = text[: found.start()].count("\n")
        if not known & {(mean, low, high), (-mean, -high, -low)} and not document.says_no_log(line):
            yield f"{document.name}:{line + 1}: {found[0]} is in no table made from a log"


def intervals_of(text: str) -> Iterator[tuple[float, float, float]]:
    """Yield mean and ends of each interval."""
    return map(numbers, INTERVAL.finditer(text))


def numbers(found: re.Match[str]) -> tuple[float, float, float]:
    """Return an interval's numbers; zero has no sign."""
    mean, low, high = (float(part.replace("−", "-")) + 0.0 for part in found.groups())
    return mean, low, high


def rewrite(document: Document) -> str:
    """Return a document's text with the tables that the logs give."""
    lines = list(document.lines)
    for start, end in reversed(list(document.tables())):
        if made := MADE.fullmatch(document.above(start)):
            lines[start:end] = TABLES[made[1]]()
    return "\n".join(lines) + "\n"


def problems(texts: dict[str, str], only: str | None = None) -> list[str]:
    """Return what is wrong with the figures of all documents, or of only one of them."""
    found: list[str] = []
    for name in texts if only is None else [only]:
        document = Document(name, texts[name])
        found += check_file(name, texts[name]) if name in FILES else check(document, texts)
        if name in TEXTS:
            files = [texts[file] for file in FILES if file.startswith(TEXTS[name])]
            found += check_intervals(document, "\n".join([*files, *made_for(texts[name])]))
    return found


def made_for(text: str) -> list[str]:
    """Return the lines of the tables that a document has from logs."""
    return [line for name in MADE.findall(text) if name in TABLES for line in TABLES[name]()]


def read_documents() -> dict[str, str]:
    """Return the text of each document by its path."""
    paths = {path for pattern in DOCUMENTS for path in ROOT.glob(pattern)}
    names = sorted(path.relative_to(ROOT).as_posix() for path in paths)
    ours = [name for name in names if not re.search(r"/(work[^/]*|packages|wheels)/", name)]
    return {name: (ROOT / name).read_text(encoding="utf-8") for name in ours}


def main() -> int:
    """Check, or with --write put the logs' figures into the documents first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the tables that come from logs")
    texts = read_documents()
    if parser.parse_args().write:
        for name, make in FILES.items():
            texts[name] = "\n".join(make()).rstrip("\n") + "\n"
        for name in texts.keys() - FILES.keys():
            texts[name] = rewrite(Document(name, texts[name]))
        for name, text in texts.items():
            (ROOT / name).write_text(text, encoding="utf-8")
    found = problems(texts)
    print("\n".join(found) if found else f"The figures of {len(texts)} documents are those of the logs.")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
