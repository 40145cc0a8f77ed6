"""GPUs by name."""

from __future__ import annotations

import pytest

from clipcid_cli.errors import UsageError
from clipcid_cli.runtime.devices import find_device, parse_devices


@pytest.mark.parametrize(
    ("text", "parsed"), [("8xH100", (8, "H100")), ("a100", (1, "A100")), ("16xl4", (16, "L4")), ("2xthis", (2, "this"))]
)
def test_a_number_and_a_name_are_parsed(text: str, parsed: tuple[int, str]) -> None:
    assert parse_devices(text) == parsed


@pytest.mark.parametrize("text", ["", "8", "8x", "0xH100", "8xH99", "-1xH100", "8*H100"])
def test_other_texts_are_usage_errors(text: str) -> None:
    with pytest.raises(UsageError, match="--gpus cannot be"):
        parse_devices(text)


@pytest.mark.parametrize(
    ("marketed", "name"),
    [("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA A100-SXM4-80GB", "A100"), ("NVIDIA L40S", None), ("NVIDIA L4", "L4")],
)
def test_a_driver_names_a_device_of_the_table(marketed: str, name: str | None) -> None:
    device = find_device(marketed)
    assert (None if device is None else device.name) == name
