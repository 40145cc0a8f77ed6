"""Captions of samples: from the bytes of a member, a field or a cell to texts, neither too many nor too long."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Sequence
from itertools import chain, islice
from typing import Any

from clipcid_cli.formats.skips import Skips

MOST_TEXT = 2**22
"""Bytes of a file of captions or attributes; of a longer one no more is read."""

LONGEST_CAPTION = 8_192
"""Characters of a caption; a tokenizer reads no more of one."""

_MOST_CAPTIONS = 1_000  # of an image, by each key

_MOST_OF_CELL = 4 * LONGEST_CAPTION + 1  # characters, or bytes, so that what is too long for a caption stays so

TXT = "txt"
"""Key of the captions of a tar where no other is given."""

JSON = "json"
"""Extension of the member with attributes, whose fields may be captions."""

_FIELD = f"{JSON}:"  # before the name of a field of the json member


def member_of(key: str) -> str:
    """Return the extension of the member that holds the captions of a key."""
    return JSON if key.startswith(_FIELD) else key.lower()


def split_captions(
    content: bytes, key: str = TXT, *, a_line_each: bool = False, skips: Skips | None = None
) -> tuple[str, ...]:
    """Return the captions in a member: a field of a json; else all of its text, or one caption a line.

    Args:
        content: More than `MOST_TEXT` bytes are cut off; of a json that is too long there is no caption.
        skips: Counts captions that are not used as they are stored.
    """
    skips = Skips() if skips is None else skips
    if key.startswith(_FIELD):
        fields = parse_json(content)
        return clean_captions(fields.get(key.removeprefix(_FIELD)) if isinstance(fields, dict) else None, skips)
    text = _decode(content, skips).removeprefix("\ufeff").strip()
    if a_line_each:
        if len(content) > MOST_TEXT:
            skips.change("cut")
        return clean_captions(text.splitlines(), skips)
    if "\n" in text:
        skips.change("several_lines")
    return _limit((text,), skips) if text else ()


def parse_json(content: bytes) -> Any:
    """Return what a json member says; None where it is none, has more than `MOST_TEXT` bytes, or nests too deeply."""
    try:
        return json.loads(content) if len(content) <= MOST_TEXT else None
    except (ValueError, RecursionError):
        return None


def clean_captions(value: Any, skips: Skips) -> tuple[str, ...]:
    """Return the captions in a value of a field or cell: a text or several; of anything else none."""
    texts: Iterable[Any] = [value] if isinstance(value, str | bytes) else value if isinstance(value, Sequence) else ()
    cleaned = (_clean(text, skips) for text in texts if isinstance(text, str | bytes))
    captions = tuple(islice(filter(None, cleaned), _MOST_CAPTIONS + 1))
    if count := sum("\n" in caption for caption in captions):
        skips.change("several_lines", count)
    return _limit(captions, skips)


def gather_captions(keys: Sequence[str], by_key: Sequence[Sequence[str]], skips: Skips) -> tuple[str, ...]:
    """Return all captions of a sample, key by key; keys without a caption are counted."""
    for key, captions in zip(keys, by_key, strict=True):
        if not captions:
            skips.miss(key)
    return tuple(chain.from_iterable(by_key))


def _limit(captions: Sequence[str], skips: Skips) -> tuple[str, ...]:
    """Return captions, neither too many nor too long for a model; captions that are left out or cut are counted."""
    if len(captions) <= _MOST_CAPTIONS and max(map(len, captions), default=0) <= LONGEST_CAPTION:
        return tuple(captions)
    skips.change("cut", max(1, sum(len(caption) > LONGEST_CAPTION for caption in captions)))
    return tuple(caption[:LONGEST_CAPTION] for caption in captions[:_MOST_CAPTIONS])


def cut_cell(cell: Any) -> Any:
    """Return a cell of a parquet file without most of what `clean_captions` would cut off; the rest tells it to count."""
    if isinstance(cell, str | bytes):
        return cell[:_MOST_OF_CELL]
    return [cut_cell(part) for part in cell[: _MOST_CAPTIONS + 1]] if isinstance(cell, list) else cell


def read_cell(cell: Any) -> str:
    """Return the text of a cell, without what is too long for any; empty where it has none."""
    return "" if cell is None else str(cell)[:_MOST_OF_CELL].strip()


def _decode(content: bytes, skips: Skips) -> str:
    """Return the text of UTF-8 bytes, whatever else is among them replaced and counted."""
    is_whole = len(content) <= MOST_TEXT
    try:
        return codecs.utf_8_decode(content[:MOST_TEXT], "strict", is_whole)[0]  # a letter may be cut in two
    except UnicodeDecodeError:
        skips.change("not_utf8")
        return content[:MOST_TEXT].decode("utf-8", errors="replace")


def _clean(text: str | bytes, skips: Skips) -> str:
    """Return a text without space around it, half characters, as JSON may hold, replaced: tokenizers fail on those."""
    if isinstance(text, bytes):  # of a column that is not marked as text
        text = _decode(text, skips)
    return (text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")).strip()
