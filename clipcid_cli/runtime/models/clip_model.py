"""A loaded CLIP model: how it takes images and texts, and the rows it makes of them."""

from __future__ import annotations

import dataclasses
import math
from functools import cached_property, lru_cache
from typing import Any, cast

import msgspec
import torch

from clipcid_cli.records import ModelRecord
from clipcid_cli.runtime.models.pruned_forward import PrunedForward, is_plain_attention
from clipcid_cli.runtime.models.tokenizers import BoundedTokenizer
from clipcid_cli.runtime.precision import Precision

# Where SigLIP's logit scale and bias start (Zhai et al. 2023, arXiv 2303.15343).
SIGMOID_SCALE, SIGMOID_BIAS = 10.0, -10.0

# Images that a tower of convolutions takes at once on a CPU: what a layer makes of so many stays in the caches. 64 at once
# took 144 ms an image with an RN50 and 44 with an EfficientNet-Lite0, 8 at once 84 and 14 (2 cores of an EPYC). ViTs gain
# nothing.
_CONVOLVED_AT_ONCE = 8


def normalize_pixels(pixels: torch.Tensor, preprocess: dict[str, Any]) -> torch.Tensor:
    """Scale and shift bytes, [B, H, W, 3], as torchvision's ToTensor and Normalize do: float32 [B, 3, H, W], contiguous."""
    mean = _per_channel(tuple(preprocess["mean"]), pixels.device)
    std = _per_channel(tuple(preprocess["std"]), pixels.device)
    channels_first = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return channels_first.div_(255).sub_(mean).div_(std)


@lru_cache(maxsize=64)
def _per_channel(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Return float32 [3, 1, 1]; kept, since every copy to a GPU makes the host wait."""
    return torch.tensor(values, dtype=torch.float32, device=device).view(3, 1, 1)


@dataclasses.dataclass(frozen=True)
class ClipModel:
    """A CLIP model on its device, in evaluation mode, with float32 weights."""

    info: ModelRecord
    module: torch.nn.Module
    tokenizer: BoundedTokenizer
    device: torch.device

    @property
    def logit_scale(self) -> float:
        """Factor on cosine similarities before the softmax: exp of the learned parameter."""
        return float(cast(torch.Tensor, self.module.logit_scale).detach().exp())

    @property
    def logit_bias(self) -> float | None:
        """What is added to scaled cosine similarities, in models trained with a sigmoid loss; None in others."""
        bias = getattr(self.module, "logit_bias", None)
        return float(bias.detach()) if isinstance(bias, torch.Tensor) else None

    def with_logit_bias(self) -> ClipModel:
        """Return a model that has a logit bias: itself, or with a new one, and the scale that goes with it."""
        if self.logit_bias is not None:
            return self
        log_scale = cast(torch.nn.Parameter, self.module.logit_scale)
        with torch.no_grad():
            log_scale.fill_(math.log(SIGMOID_SCALE))
        self.module.logit_bias = torch.nn.Parameter(torch.full_like(log_scale, SIGMOID_BIAS))
        starts = {"init_logit_scale": math.log(SIGMOID_SCALE), "init_logit_bias": SIGMOID_BIAS}
        info = msgspec.structs.replace(self.info, parameters=self.info.parameters + 1, config=self.info.config | starts)
        return dataclasses.replace(self, info=info)

    def cast_products(self, precision: Precision) -> None:
        """Convert the weights of matrix products and convolutions to `precision`, for a model that only encodes.

        Autocast alone casts them at every call, and for attention layers once per sample: a ViT-B-32 embedded 33 images per
        second in fp32, 38 under bf16 autocast, and 151 with its weights cast once (2 cores with AMX).
        """
        for module in self.module.modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) or is_plain_attention(module):
                module.to(precision.dtype)

    @cached_property
    def _towers(self) -> PrunedForward:
        return PrunedForward(self.module)

    @cached_property
    def _at_once(self) -> int:
        modules = cast(torch.nn.Module, self.module.visual).modules()
        convolutions = sum(isinstance(module, torch.nn.Conv2d) for module in modules)
        is_vit = convolutions <= 1  # which cuts its patches
        return 2**20 if is_vit or self.device.type != "cpu" else _CONVOLVED_AT_ONCE

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalise pixels, uint8 [B, H, W, 3] on any device, for the image tower: float32 [B, 3, H, W] on the model's."""
        return normalize_pixels(pixels.to(self.device, non_blocking=True), self.info.preprocess)

    def encode_images(self, pixels: torch.Tensor, precision: Precision) -> torch.Tensor:
        """Embed pixels, uint8 [B, H, W, 3] or normalised float32 [B, 3, H, W], to unit rows, float32 [B, D]."""
        prepared = self.normalize(pixels) if pixels.dtype == torch.uint8 else pixels.to(self.device)
        with torch.inference_mode(), precision.autocast(self.device):
            parts = torch.split(prepared, self._at_once)
            features = torch.cat(list(map(self._towers.encode_images, parts)))
        return torch.nn.functional.normalize(features.float(), dim=-1)

    def encode_texts(self, tokens: torch.Tensor, precision: Precision) -> torch.Tensor:
        """Embed tokens, int64 [B, L] as `tokenizer` gives them, to unit rows, float32 [B, D] on the model's device."""
        with torch.inference_mode(), precision.autocast(self.device):
            features = self._towers.encode_texts(tokens)
        return torch.nn.functional.normalize(features.float(), dim=-1)
