"""The two halves of a CLIP: as modules of their own, tensors in and unit rows out, which exporters can trace; and frozen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch

# A tower, in PyTorch or elsewhere: prepared pixels or tokens to unit rows [B, D].
Encode = Callable[[torch.Tensor], torch.Tensor]


class ImageTower(torch.nn.Module):
    """Normalised pixels, float32 [B, 3, H, W], to unit rows, float32 [B, D].

    Args:
        clip: A module of open_clip, or any with its ``encode_image(pixels, normalize=True)``.
    """

    def __init__(self, clip: torch.nn.Module) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Embed images."""
        return cast(torch.Tensor, self.clip.encode_image(pixel_values, normalize=True))  # type: ignore[operator]  # every CLIP has it


class DenseImageTower(torch.nn.Module):
    """Normalised pixels, float32 [B, 3, H, W], to unit rows [B, D] and the patches of the last layer [B, h, w, D].

    A patch's values are its token after the last block, the final norm and the projection that also makes the image's row,
    not normalised. Row 0 is the top of the image. They are what open_clip's
    ``visual.forward_intermediates(pixels, indices=1, normalize_intermediates=True, output_fmt="NLC")`` gives as its last
    intermediate, times ``visual.proj``. (MaskCLIP also replaces the last block's attention by its values; this does not.)

    Args:
        clip: A CLIP of open_clip whose image tower `has_patches`.
    """

    def __init__(self, clip: torch.nn.Module) -> None:
        super().__init__()
        self.visual = cast(Any, clip).visual

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Embed images and their patches in one pass."""
        found = self.visual.forward_intermediates(
            pixel_values, indices=1, normalize_intermediates=True, output_fmt="NLC"
        )
        rows = torch.nn.functional.normalize(found["image_features"], dim=-1)
        patches = found["image_intermediates"][-1] @ self.visual.proj
        height, width = self.visual.grid_size
        return rows, patches.unflatten(1, (height, width))


def has_patches(clip: torch.nn.Module) -> bool:
    """Tell whether the image tower is a ViT of open_clip whose patches end in the space of its image rows."""
    visual = cast(Any, clip).visual
    return (
        hasattr(visual, "grid_size")
        and hasattr(visual, "ln_post")
        and getattr(visual, "attn_pool", None) is None
        and getattr(visual, "proj", None) is not None
    )


def image_tower_kind(clip: torch.nn.Module) -> str:
    """Return the class name of the image tower, for messages."""
    return type(cast(Any, clip).visual).__name__


class TextTower(torch.nn.Module):
    """Tokens, int64 [B, L], to unit rows, float32 [B, D].

    Args:
        clip: A module of open_clip, or any with its ``encode_text(tokens, normalize=True)``.
    """

    def __init__(self, clip: torch.nn.Module) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Embed texts."""
        return cast(torch.Tensor, self.clip.encode_text(input_ids, normalize=True))  # type: ignore[operator]  # every CLIP has it


def freeze(clip: torch.nn.Module, tower: str) -> list[torch.nn.Module]:
    """Freeze a tower's parameters.

    Args:
        tower: ``image`` or ``text``.

    Returns:
        The tower's modules, which stay in evaluation mode: no dropout, no new statistics.
    """
    for name, parameter in clip.named_parameters():
        if name not in ("logit_scale", "logit_bias") and name.startswith("visual.") == (tower == "image"):
            parameter.requires_grad_(False)
    return [part for name, part in clip.named_children() if (name == "visual") == (tower == "image")]
