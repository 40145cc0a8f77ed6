"""The flags of image augmentation, for every step that augments images."""

from __future__ import annotations

from typing import Any

from clipcid_cli.steps.settings.fields import option


def crop_scale_option(group: str) -> Any:
    """Declare the flag of the smallest crop."""
    return option(
        0.9,
        "Smallest share of the image area that a random crop keeps; 1 disables cropping.",
        group=group,
        minimum=0.0,
        maximum=1.0,
        above_minimum=True,
    )


def color_jitter_option(group: str) -> Any:
    """Declare the flag of brightness, contrast and saturation."""
    return option(
        0.0,
        "Strength of random changes in brightness, contrast and saturation.",
        group=group,
        minimum=0.0,
        maximum=1.0,
    )


def gray_probability_option(group: str) -> Any:
    """Declare the flag of grayscale images."""
    return option(0.0, "Probability of converting an image to grayscale.", group=group, minimum=0.0, maximum=1.0)
