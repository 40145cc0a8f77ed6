"""Towers that are left as they are while the other is trained."""

from __future__ import annotations

from torch import nn


def freeze(module: nn.Module, tower: str) -> list[nn.Module]:
    """Take a tower's parameters out of training.

    Args:
        module: An open_clip model.
        tower: ``image`` or ``text``.

    Returns:
        The tower's modules, which stay in evaluation mode: no dropout, no new statistics.
    """
    for name, parameter in module.named_parameters():
        if name not in ("logit_scale", "logit_bias") and name.startswith("visual.") == (tower == "image"):
            parameter.requires_grad_(False)
    return [part for name, part in module.named_children() if (name == "visual") == (tower == "image")]
