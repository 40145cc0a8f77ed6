"""Counting what cannot be used."""

from __future__ import annotations

import pytest

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.skips import Skips


def test_counts_are_added_up_and_the_first_few_named() -> None:
    skips, others = Skips(), Skips()
    for number in range(4):
        skips.add("no_caption", f"a{number}")
        others.add("no_caption", f"b{number}")
    others.add("no_image", "c")
    skips.merge(others)
    assert skips.total == 9
    assert skips.describe() == "  8 × no caption: a0, a1, a2, a3, b0, …\n  1 × no image: c"


def test_too_many_is_an_error_with_both_numbers() -> None:
    skips = Skips()
    skips.add("unreadable_image", "shard 3: 00017")
    skips.check(100, 0.01, "data")
    with pytest.raises(
        ClipcidError, match=r"1 of 50 samples in data cannot be used: 2\.0%, more than the allowed 1\.0%"
    ) as raised:
        skips.check(50, 0.01, "data", "Do that.")
    assert "shard 3: 00017" in raised.value.message
    assert raised.value.fix.startswith("Do that.\nFix")
    assert "--max-bad-fraction" in raised.value.fix
