"""Patterns of names with braces, such as ``{00000..00099}.tar``: how many they make is counted before a list is made."""

from __future__ import annotations

import re
import string

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.shard_files import FORMS, SEPARATOR

_MAX_SHARDS = 1_000_000  # of a pattern: LAION-5B has some 232,000
_MANY = 10**15  # what is counted as more is so many
_MAX_NESTED = 100
_NUMBERS = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?\}")
_LETTERS = re.compile(r"([A-Za-z])\.\.([A-Za-z])(?:\.\.-?(\d+))?")
_ALPHABET = string.ascii_uppercase + string.ascii_lowercase  # in the order of ranges between braces
_GROUP = re.compile(r"\{([^{}]*)\}")
_ESCAPED = re.compile(r"\\.")
_COUNTED = re.compile("\0(\\d+)\0")


def expand(spec: str) -> list[str]:
    """Return the names that a pattern makes, as webdataset expands it."""
    count = _count_expansions(spec)
    if count > _MAX_SHARDS:
        raise ClipcidError(
            f"{spec} names {count:,} shards, more than {_MAX_SHARDS:,}.", "Check the numbers between the braces."
        )
    from webdataset.shardlists import expand_urls  # 0.2 s, which only patterns cost

    try:
        return [part for part in expand_urls(spec) if part]
    except ValueError as error:  # braceexpand.UnbalancedBracesError
        raise ClipcidError(f"{spec}: the braces are unbalanced.", FORMS) from error
    except AssertionError as error:
        raise ClipcidError(
            f"{spec}: webdataset takes ${{NAME}} from the environment variable WDS_NAME, which is not set.",
            "Set it, or write the value in place of it.",
        ) from error


def _count_expansions(spec: str) -> int:
    """Count what braces make, before a list of it fills the memory.

    From the inside out: a group makes the sum of what its alternatives make, an alternative the product of its groups.
    """
    return sum(map(_count_part, spec.replace("\0", "").split(SEPARATOR)))


def _count_part(part: str) -> int:
    part = _ESCAPED.sub("", part)
    for _ in range(_MAX_NESTED):
        counted = _GROUP.sub(lambda group: f"\0{_count_group(group[1])}\0", part)
        if counted == part:
            return _count_alternative(part)
        part = counted
    return _MANY


def _count_group(content: str) -> int:
    numbers = _NUMBERS.fullmatch(f"{{{content}}}")
    letters = _LETTERS.fullmatch(content)
    if numbers is not None:
        first, last, step = (int(value or 1) for value in numbers.groups())
    elif letters is not None:
        first, last = (_ALPHABET.index(letter) for letter in letters.groups()[:2])
        step = int(letters[3] or 1)
    else:
        return min(_MANY, sum(map(_count_alternative, content.split(","))))
    return abs(last - first) // max(1, abs(step)) + 1


def _count_alternative(text: str) -> int:
    count = 1
    for counted in _COUNTED.findall(text):
        count = min(_MANY, count * int(counted))
    return count
