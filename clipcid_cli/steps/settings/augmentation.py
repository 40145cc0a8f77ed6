"""The flags that say how images are varied, for every step that varies them."""

from __future__ import annotations

from typing import Any

from clipcid_cli.steps.settings.fields import option


def crop_scale_option(group: str, of: str) -> Any:
    """Declare the flag of the smallest crop; `of` says what is cropped, for the help."""
    return option(
        0.9,
        f"Smallest share of an image's area that a random crop{of} keeps; 1 for no cropping.",
        group=group,
        minimum=0.0,
        maximum=1.0,
        above_minimum=True,
    )


def color_jitter_option(group: str, of: str) -> Any:
    """Declare the flag of brightness, contrast and saturation."""
    return option(
        0.0, f"Strength of random brightness, contrast and saturation{of}.", group=group, minimum=0.0, maximum=1.0
    )


def gray_probability_option(group: str, what: str) -> Any:
    """Declare the flag of grey images; `what` is turned grey."""
    return option(0.0, f"Share of {what} turned grey.", group=group, minimum=0.0, maximum=1.0)
