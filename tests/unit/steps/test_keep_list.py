"""What is said of a keep list that lacks samples: a few may be images that could not be used, most are of other data."""

from __future__ import annotations

from pathlib import Path

import pytest

from clipcid_cli.errors import ClipcidError
from clipcid_cli.steps.keep_list import ChosenKeepList
from clipcid_cli.steps.reporting import Reporter


@pytest.mark.parametrize(
    ("missing", "said", "fix"),
    [
        (5, "lacks 5 of the 300 samples of data, more than the allowed 1.0%", "--max-bad-fraction 0.017"),
        (200, "lacks 200 of the 300 samples of data: it was made from other data", "--keep-list none"),
    ],
)
def test_a_list_that_lacks_samples_is_refused_with_what_allows_them(missing: int, said: str, fix: str) -> None:
    keep_list = ChosenKeepList(Path("keep.parquet"), 200, 300 - missing, "samples", 0.01)
    with pytest.raises(ClipcidError, match=said) as refused:
        keep_list.report("data", 300, kept=200, missing=missing, reporter=Reporter())
    assert fix in refused.value.fix
