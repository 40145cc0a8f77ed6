"""The two halves of a CLIP as modules of their own, tensors in and unit rows out, which exporters can trace."""

from __future__ import annotations

from typing import cast

import torch


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
