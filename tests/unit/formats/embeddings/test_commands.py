"""The command that makes embeddings again: all they hold, and no flag at its default."""

from __future__ import annotations

from pathlib import Path

import pytest

from clipcid_cli.steps.embed.command import data_command, texts_command


def sidecar(**settings: object) -> dict:
    made = {"text": True, "keys": "sample", "fast_decode": False, "batch_size": 64, "precision": "fp32"}
    return {"settings": made | settings, "model": {"spec": "ViT-B-32:laion2b_s34b_b79k"}}


VIEWS = {"views": 4, "view_kind": ["crop"], "crop_scale": 0.9, "color_jitter": 0.0, "gray_probability": 0.0, "seed": 0}


@pytest.mark.parametrize(
    ("made", "more", "flags"),
    [
        ({}, {}, ""),
        ({"keys": "shard", "fast_decode": True, "text": False}, {}, " --no-text --fast-decode --keys shard"),
        (VIEWS, {}, " --views 4"),
        (VIEWS | {"view_kind": ["strong", "mix"], "seed": 3}, {}, " --views 4 --view-kind strong,mix --seed 3"),
        (VIEWS, {"text_variants": 8}, " --views 4 --text-variants 8"),
        ({"text_variants": 2, "seed": 5, "text_variant_rules": 1}, {"text_variants": 8}, " --text-variants 8 --seed 5"),
    ],
)
def test_a_command_has_what_was_made_and_what_is_missing(made: dict, more: dict, flags: str) -> None:
    words = data_command(Path("some where"), sidecar(**made), **more).split(" --")
    assert words[0] == "clipcid embed DATA"
    expected = f" --model ViT-B-32:laion2b_s34b_b79k --out 'some where'{flags} --overwrite".split(" --")[1:]
    assert sorted(words[1:]) == sorted(expected)


def test_others_are_not_replaced() -> None:
    assert data_command(Path("other"), None, text_variants=8) == "clipcid embed DATA --text-variants 8"


def test_texts() -> None:
    assert texts_command(None) == "clipcid embed --texts FILE --model MODEL"
    found = texts_command("ViT-L-14", work=Path("w"), overwrite=True)
    assert sorted(found.split(" --")) == sorted(
        ["clipcid embed", "texts FILE", "model ViT-L-14", "work w", "overwrite"]
    )
