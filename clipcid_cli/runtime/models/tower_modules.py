"""The towers of a CLIP as PyTorch modules: to be traced by exporters, or frozen in training."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn


class ImageTower(nn.Module):
    """Normalised pixels, float32 [B, 3, H, W], to unit rows, float32 [B, D]."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.clip: Any = clip

    def forward(self, pixel_values: Tensor) -> Tensor:
        return cast(Tensor, self.clip.encode_image(pixel_values, normalize=True))


class TextTower(nn.Module):
    """Tokens, int64 [B, L], to unit rows, float32 [B, D]."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.clip: Any = clip

    def forward(self, input_ids: Tensor) -> Tensor:
        return cast(Tensor, self.clip.encode_text(input_ids, normalize=True))


class DenseImageTower(nn.Module):
    """Normalised pixels, float32 [B, 3, H, W], to unit rows [B, D] and the patches of the last layer [B, h, w, D].

    A patch's values are its token after the last block, the final norm and the projection that also makes the image's row,
    not normalised. Row 0 is the top of the image. (MaskCLIP also replaces the last block's attention by its values.)
    """

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.visual = cast(Any, clip).visual

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        features = self.visual.forward_intermediates(
            pixel_values, indices=1, normalize_intermediates=True, output_fmt="NLC"
        )
        rows = nn.functional.normalize(features["image_features"], dim=-1)
        patches = features["image_intermediates"][-1] @ self.visual.proj
        return rows, patches.unflatten(1, self.visual.grid_size)


def has_patches(clip: nn.Module) -> bool:
    """Tell whether the image tower is a ViT of open_clip whose patches end in the space of its image rows."""
    visual = cast(Any, clip).visual
    return (
        hasattr(visual, "grid_size")
        and hasattr(visual, "ln_post")
        and getattr(visual, "attn_pool", None) is None
        and getattr(visual, "proj", None) is not None
    )


def image_tower_kind(clip: nn.Module) -> str:
    """Return the class name of the image tower, for messages."""
    return type(cast(Any, clip).visual).__name__


def freeze(clip: nn.Module, tower: str) -> list[nn.Module]:
    """Freeze a tower, ``image`` or ``text``, and return its modules, which stay in evaluation mode."""
    for name, parameter in clip.named_parameters():
        if name not in ("logit_scale", "logit_bias") and name.startswith("visual.") == (tower == "image"):
            parameter.requires_grad_(False)
    return [part for name, part in clip.named_children() if (name == "visual") == (tower == "image")]
