"""The flags of `distill` for what the teacher embedded beside images and captions: views, text variants, texts."""

from __future__ import annotations

from typing import Any

from clipcid_cli.steps.settings.fields import option

DEFAULT_VARIANT_SHARE = 2 / 3


def views_option(group: str) -> Any:
    """Declare the flag that shows stored views."""
    return option(
        None,
        "`stored`, the default, trains on the views of `embed --views`, if there are any, each with its own teacher "
        "embedding. `none` draws new views and uses the teacher's embedding of the whole image.",
        group=group,
        choices=("stored", "none"),
    )


def text_variant_share_option(group: str) -> Any:
    """Declare the flag of the share of captions shown as a variant."""
    return option(
        None,
        "Share of the captions shown as one of the variants of `embed --text-variants`, if there are any; by default 2/3.",
        group=group,
        minimum=0.0,
        maximum=1.0,
    )


def extra_texts_option(group: str) -> Any:
    """Declare the flag of further texts."""
    return option(
        None,
        "Further texts in each batch, for the text tower alone, by losses fd and mfd: those of `embed --texts`, or else "
        "variants of captions. By default as many as samples, where there are such texts; 0 for none.",
        group=group,
        minimum=0,
    )


def texts_option(group: str) -> Any:
    """Declare the flag of their folder."""
    return option(
        None,
        "Output folder of `embed --texts` for --extra-texts; by default the one in the work directory.",
        group=group,
        operational=True,
    )
