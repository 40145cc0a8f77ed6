"""The commands of fixes can be pasted: they name the model, the data, the work directory, and no flag at its default."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sidecars import DATA, make_sidecar

from clipcid_cli.formats.embeddings.command import DEFAULTS, data_command
from clipcid_cli.formats.sidecar import EmbedSidecar
from clipcid_cli.steps.settings.embed import EmbedSettings

PLACE = Path("some where")
SHARED = "--model ViT-B-32:laion2b_s34b_b79k --precision fp32 --batch-size 64 --out 'some where' --overwrite"
LIST = {"spec": "my list.csv", "keys": "sample", "image": "url", "caption": "title", "key": "id"}
VIEWS = {"views": 4, "view_kind": ["crop"], "crop_scale": 0.9, "color_jitter": 0.0, "gray_probability": 0.0, "seed": 0}


def sidecar(data: dict | None = None, **settings: object) -> EmbedSidecar:
    plain = make_sidecar(EmbedSidecar)
    entries = {
        "settings": plain["settings"] | settings,
        "data": data or DATA | {"keys": settings.get("keys", "sample")},
        "model": plain["model"] | {"spec": "ViT-B-32:laion2b_s34b_b79k"},
    }
    return msgspec.convert(plain | entries, EmbedSidecar)


def assert_says(command: str, expected: str) -> None:
    """Compare commands but for the order of their flags."""
    assert sorted(command.split(" --")) == sorted(f"clipcid embed {expected}".split(" --"))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ""),
        ({"keys": "shard", "fast_decode": True, "text": False}, " --no-text --fast-decode --keys shard"),
        (VIEWS, " --views 4"),
        (VIEWS | {"view_kind": ["strong", "mix"], "seed": 3}, " --views 4 --view-kind strong,mix --seed 3"),
    ],
)
def test_a_command_has_what_was_made(settings: dict[str, Any], expected: str) -> None:
    assert_says(data_command(PLACE, sidecar(**settings)), f"data {SHARED}{expected}")


def test_a_command_has_what_is_missing() -> None:
    for settings, expected in (
        (VIEWS, "--views 4"),
        ({"text_variants": 2, "seed": 5, "text_variant_rules": 1}, "--seed 5"),
    ):
        found = data_command(PLACE, sidecar(**settings), text_variants=8)
        assert_says(found, f"data {SHARED} --text-variants 8 {expected}")
    # What clipcid did not make is not replaced.
    assert_says(data_command(PLACE, None, text_variants=8), "DATA --model MODEL --text-variants 8")


def test_a_command_names_the_columns_of_the_list_it_names() -> None:
    for data in (None, "my list.csv"):
        found = data_command(PLACE, sidecar(LIST), data)
        assert_says(found, f"'my list.csv' {SHARED} --image-column url --key-column id")
    found = data_command(PLACE, sidecar(LIST), "other.csv", key_column="number")
    assert_says(found, f"other.csv {SHARED} --key-column number")


def test_the_values_that_need_no_flag_are_the_defaults() -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(EmbedSettings)} | {"view_kind": ("crop",)}
    assert {name: defaults[name] for name in DEFAULTS} == DEFAULTS
