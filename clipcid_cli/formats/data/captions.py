"""Captions where they are: members of a tar, fields of its json members, columns of a list or of a parquet file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

from clipcid_cli.formats.skips import Skips

TXT = "txt"
"""Key of the captions of a tar where no other is given."""

JSON = "json"
"""Extension of the member with attributes, whose fields may be captions."""

_FIELD = f"{JSON}:"  # before the name of a field of the json member


def member_of(key: str) -> str:
    """Return the extension of the member that holds the captions of a key."""
    return JSON if key.startswith(_FIELD) else key.lower()


def split_captions(content: bytes, key: str = TXT, *, a_line_each: bool = False) -> tuple[str, ...]:
    """Return the captions in a member: a field of a json; else all of its text, or one caption a line."""
    if key.startswith(_FIELD):
        try:
            fields = json.loads(content)
        except ValueError:
            return ()
        return clean_captions(fields.get(key.removeprefix(_FIELD)) if isinstance(fields, dict) else None)
    whole = content.decode("utf-8", errors="replace")
    return clean_captions(whole.splitlines() if a_line_each else whole)


def clean_captions(found: Any) -> tuple[str, ...]:
    """Return the captions in a value of a field or cell: a text or several; of anything else none."""
    texts: Iterable[Any] = [found] if isinstance(found, str) else found if isinstance(found, Sequence) else ()
    return tuple(text.strip() for text in texts if isinstance(text, str) and text.strip())


def gather_captions(keys: Sequence[str], found: Sequence[Sequence[str]], skips: Skips) -> tuple[str, ...]:
    """Return all captions of a sample, those of each key in turn; keys that have none are counted."""
    for key, captions in zip(keys, found, strict=True):
        if not captions:
            skips.miss(key)
    return tuple(chain.from_iterable(found))
