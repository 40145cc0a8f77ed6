"""What a report needs to be readable on a phone and in the dark, as far as its source tells.

Pictures of them, at 400 and 1,200 px and in both colour schemes, were looked at.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from clipcid_cli.formats.report import make_figure, svg

TEMPLATES = Path(__file__).parents[3] / "clipcid_cli" / "formats" / "templates"
PAGES = sorted(path.name for path in TEMPLATES.glob("*.html") if path.name not in ("base.html", "macros.html"))
_PHONE = 400


def read(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


def test_the_page_follows_the_screen_and_the_colour_scheme() -> None:
    base = read("base.html")
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in base
    assert "color-scheme: light dark" in base
    light, dark = (set(re.findall(r"--[a-z]+(?=:)", part)) for part in base.split("prefers-color-scheme: dark")[:2])
    assert light
    assert light <= dark
    assert set(re.findall(r"var\((--[a-z]+)\)", "".join(map(read, ["base.html", *PAGES])))) <= light


@pytest.mark.parametrize("name", PAGES)
def test_every_page_is_the_base_page_and_nothing_on_it_is_wider_than_a_phone(name: str) -> None:
    page = read(name)
    assert page.startswith('{% extends "base.html" %}')
    colors = re.findall(r"#[0-9a-f]{3,6}\b", page.replace("#}", "").replace("{#", ""))
    assert not colors, "a colour outside the base page does not follow the colour scheme"
    page += read("base.html")
    for value, unit in re.findall(r"(?<!max-)(?<!-)\b(?:min-)?width:\s*([\d.]+)(px|rem|em|vw|%)", page):
        assert float(value) * {"px": 1, "rem": 16, "em": 16, "vw": _PHONE / 100, "%": _PHONE / 100}[unit] <= _PHONE
    assert not re.search(r"<(?:table|img|svg|div)[^>]* width=", page)
    # A table of three columns or more of text scrolls by itself, or becomes lines of name and value.
    for before, table in re.findall(r"(.{0,20})(<table[^>]*>(?:(?!</table>).)*)", page, flags=re.DOTALL):
        first = table.partition("</tr>")[0]
        columns = len(re.findall(r"<t[hd]", first))
        assert columns < 3 or '<div class="wide">' in before or "stack" in table or "bars" in table, table[:120]


def test_a_figure_scales_down_and_takes_the_colour_of_the_text() -> None:
    figure = make_figure()
    figure.subplots().plot([0, 1], [0, 1], color="#1f77b4")
    drawn = svg(figure, "A line")
    assert "max-width:" in drawn
    assert "currentColor" in drawn
    assert "#000000" not in drawn
    assert ".figure svg { width: 100%; height: auto;" in read("base.html")
    width = re.search(r"max-width: (\d+)px", drawn)
    assert width is not None
    assert int(width[1]) <= 1.5 * _PHONE, "its text would be too small on a phone"
