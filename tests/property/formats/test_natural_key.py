"""The order of shards and images, of any names."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from clipcid_cli.formats.data.samples import natural_key

NAMES = st.lists(st.text("a19.", max_size=6), unique=True)


@given(names=NAMES)
def test_any_names_have_one_order_by_the_numbers_in_them(names: list[str]) -> None:
    ordered = sorted(names, key=natural_key)
    names.reverse()
    assert ordered == sorted(names, key=natural_key)
    numbers = [name for name in ordered if name.isdigit()]
    assert list(map(int, numbers)) == sorted(map(int, numbers))


def test_a_name_that_begins_another_comes_before_it() -> None:
    assert sorted(["cat2", "cat10", "cat", "ca"], key=natural_key) == ["ca", "cat", "cat2", "cat10"]
