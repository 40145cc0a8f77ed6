"""Flags that would have no effect are refused, and the error says which to omit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from clipcid_cli.errors import UsageError
from clipcid_cli.steps.settings.distill import DistillSettings
from clipcid_cli.steps.settings.embed import EmbedSettings

TEXTS: dict[str, Any] = {"texts": Path("lines.txt")}
NOBODY: dict[str, Any] = {"teacher": "none"}
ONLINE: dict[str, Any] = {"online_teacher": True, "preset": "clip-kd"}


@pytest.mark.parametrize(
    ("settings", "message", "fix"),
    [
        (NOBODY | {"views": "stored"}, "--views stored: .* no loss of the run needs a teacher", "Omit --views stored."),
        (NOBODY | TEXTS, "--texts: .* no loss of the run", "Omit --texts."),
        (
            ONLINE | {"views": "stored"} | TEXTS,
            "--views stored and --texts: .*, but --online-teacher reads none",
            "Omit --views stored and --texts, or --online-teacher.",
        ),
        ({"preset": "cid"} | TEXTS, "--texts, but no loss of the run takes texts", "Add one that does (fd, mfd)"),
        (
            {"preset": "clip-kd", "freeze_text": True} | TEXTS,
            "--texts trains the text tower on stored embeddings of texts: not with --freeze-text",
            "Omit one",
        ),
        (
            {"cluster_towers": "both", "label_share": 0.0, "candidate_correction": False},
            "--cluster-towers, --label-share, --candidate-correction: for the cluster loss",
            "Omit --cluster-towers, --label-share, --candidate-correction, or use --preset cid",
        ),
        (NOBODY | {"clusters": Path("x")}, "--clusters: for the cluster loss", "Omit --clusters."),
        ({"gather_with_grad": False}, "--no-gather-with-grad: gradients always flow", "Omit it."),
        ({"extra_texts": 0} | TEXTS, "--texts names the texts for --extra-texts, but", "Omit one"),
    ],
)
def test_of_distill(settings: dict[str, Any], message: str, fix: str) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        DistillSettings(student="x", **settings)
    assert raised.value.fix.startswith(fix)


@pytest.mark.parametrize("settings", [NOBODY, ONLINE])
def test_those_that_turn_it_off_are_not(settings: dict[str, Any]) -> None:
    DistillSettings(student="x", **settings, views="none", extra_texts=0)
    DistillSettings(student="x", preset="clip-kd", extra_texts=8, **TEXTS)


@pytest.mark.parametrize(
    ("settings", "message", "fix"),
    [
        (TEXTS | {"fast_decode": True}, "--texts decodes no images", "Omit --fast-decode."),
        (TEXTS | {"crop_scale": 0.3}, "--crop-scale was given, but no --views", "Omit --crop-scale."),
        ({"crop_scale": 0.3}, "--crop-scale was given", "Omit --crop-scale, or add --views V"),
        ({"color_jitter": 0.3, "text_variants": 8}, "--color-jitter was given", "Omit --color-jitter, or"),
        ({"gray_probability": 0.3}, "--gray-probability was given", "Omit --gray-probability, or"),
        ({"view_kind": ("mix",)}, "--view-kind was given", "Omit --view-kind, or add --views V"),
    ],
)
def test_of_embed(settings: dict[str, Any], message: str, fix: str) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        EmbedSettings(**settings)
    assert raised.value.fix.startswith(fix)
