"""Counting what cannot be used."""

from __future__ import annotations

import pytest

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.skips import Skips


def test_counts_and_names_the_first_few() -> None:
    skips = Skips()
    for number in range(7):
        skips.add("no_caption", f"a{number}")
    skips.add("no_image", "b")
    assert skips.counts == {"no_caption": 7, "no_image": 1}
    assert skips.total == 8
    assert skips.examples["no_caption"] == ["a0", "a1", "a2", "a3", "a4"]
    assert skips.describe() == "  7 × no caption: a0, a1, a2, a3, a4, …\n  1 × no image: b"


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
