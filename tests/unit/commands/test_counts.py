"""A number of images may be written as people say it."""

import click
import pytest

from clipcid_cli.commands.balance import command

IMAGES = {"330M": 330_000_000, "1.28G": 1_280_000_000, "250k": 250_000, "5": 5}


@pytest.mark.parametrize("written", IMAGES)
def test_images_are_counted_in_thousands_millions_and_billions(written: str) -> None:
    assert command.make_context("balance", ["--images", written]).params["images"] == IMAGES[written]


@pytest.mark.parametrize("written", ["330X", "1e3", "M", "-5M", "0k", "0.1"])
def test_what_is_no_number_of_images_is_a_usage_error(written: str) -> None:
    with pytest.raises(click.BadParameter):
        command.make_context("balance", ["--images", written])
