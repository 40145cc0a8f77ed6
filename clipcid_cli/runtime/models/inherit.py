"""Initialises a small CLIP from a large one's weights: evenly spaced layers, heads and channels.

Letters of axes: w width of the residual stream, h heads × head width, q the same for queries, keys and values, m width of
the MLP, d width of the embedding; ``=`` must be equal.

Source: the idea of Wu et al. 2023 (TinyCLIP, arXiv 2309.12314), manual weight inheritance; which layers, heads and channels
are taken is our choice (theirs are learned or chosen by importance).
"""

from __future__ import annotations

import re
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipcid_cli.errors import ClipcidError

_LAYER = re.compile(r"(.*resblocks\.)(\d+)(\..*)")
# Attention pooling has heads of its own number, and its width is the embedding's.
_POOLING = ".attn_pool"
# Axes of each tensor of an open_clip transformer, by the end of its name.
_AXES = {
    "attn.in_proj_weight": "qw",
    "attn.in_proj_bias": "q",
    "attn.out_proj.weight": "wh",
    "attn.out_proj.bias": "w",
    "mlp.c_fc.weight": "mw",
    "mlp.c_fc.bias": "m",
    "mlp.c_proj.weight": "wm",
    "mlp.c_proj.bias": "w",
    "ln_1.weight": "w",
    "ln_1.bias": "w",
    "ln_2.weight": "w",
    "ln_2.bias": "w",
    "ls_1.gamma": "w",
    "ls_2.gamma": "w",
    "ln_pre.weight": "w",
    "ln_pre.bias": "w",
    "ln_post.weight": "w",
    "ln_post.bias": "w",
    "ln_final.weight": "w",
    "ln_final.bias": "w",
    "conv1.weight": "w===",
    "class_embedding": "w",
    "positional_embedding": "pw",
    "token_embedding.weight": "=w",
    "visual.proj": "wd",
    "text_projection": "wd",
}


def inherit(student: nn.Module, source: nn.Module, towers: str) -> list[str]:
    """Fill a student's weights from a larger model of the same kind, in place.

    Args:
        student: An open_clip model with transformer towers.
        source: Another, at least as deep and wide in each tower that is filled.
        towers: ``image``, ``text`` or ``both``.

    Returns:
        Names of the tensors that stay as they were: other patch sizes, other vocabularies, attention pooling.
    """
    found = source.state_dict()
    state = student.state_dict()
    heads = _heads_by_tower(student), _heads_by_tower(source)
    depths = _depths(state), _depths(found)
    left: list[str] = []
    filled = False
    for name, tensor in state.items():
        tower = "image" if name.startswith("visual.") else "text"
        if name in ("logit_scale", "logit_bias") or towers not in ("both", tower):
            continue
        from_name = _source_name(name, depths)
        axes = None if _POOLING in name else next((axes for end, axes in _AXES.items() if name.endswith(end)), None)
        if from_name not in found or axes is None or len(axes) != found[from_name].ndim:
            left.append(name)
            continue
        taken = _take(found[from_name], tensor.shape, axes, tuple(side.get(tower, 1) for side in heads), name)
        if taken is None:
            left.append(name)
            continue
        tensor.copy_(taken)
        filled = True
    if not filled:
        raise ClipcidError(
            "No tensor of the --init-from model fits the student: the towers are of different kinds.",
            "Both must be open_clip transformers (ViT image tower, CLIP text tower); or omit --init-from.",
        )
    return left


def evenly_spaced(count: int, available: int) -> Tensor:
    """Return `count` of the numbers 0 … available − 1, the first and last among them; int64, ascending."""
    if count == 1:
        return torch.zeros(1, dtype=torch.int64)
    return torch.linspace(0, available - 1, count, dtype=torch.float64).round().long()


def _take(source: Tensor, shape: torch.Size, axes: str, heads: tuple[int, ...], name: str) -> Tensor | None:
    if axes[0] == "p":
        source = _resize_positions(source, shape[0], is_image=name.startswith("visual."))
    for axis, kind in enumerate(axes):
        count, available = shape[axis], source.shape[axis]
        if kind == "=" and count != available:
            return None
        if count > available:
            raise ClipcidError(
                f"--init-from: {name} is {tuple(source.shape)} there and {tuple(shape)} in the student, which is larger.",
                "A student inherits from a model at least as deep and wide.",
            )
        if count == available:
            continue
        match kind:
            case "h":
                chosen = _head_channels(count, available, heads)
            case "q":
                one = _head_channels(count // 3, available // 3, heads)
                chosen = torch.cat([one + part * (available // 3) for part in range(3)])
            case _:
                chosen = evenly_spaced(count, available)
        source = source.index_select(axis, chosen)
    return source


def _head_channels(count: int, available: int, heads: tuple[int, ...]) -> Tensor:
    """Return evenly spaced channels of evenly spaced heads; evenly spaced over all where heads are fewer or narrower."""
    own, others = heads
    width, source_width = count // own, available // others
    if own > others or width > source_width:
        return evenly_spaced(count, available)
    first = evenly_spaced(own, others) * source_width
    return (first[:, None] + evenly_spaced(width, source_width)[None, :]).reshape(-1)


def _resize_positions(positions: Tensor, count: int, *, is_image: bool) -> Tensor:
    """Resize position embeddings [n, w] to another number of positions: those of an image are resampled, a text's cut."""
    if len(positions) == count:
        return positions
    if not is_image:
        if count > len(positions):
            raise ClipcidError(
                f"--init-from: the student's context of {count} tokens is longer than the model's {len(positions)}.",
                "Give the student a shorter context_length, or use --init-towers image.",
            )
        return positions[:count]
    old, new = round((len(positions) - 1) ** 0.5), round((count - 1) ** 0.5)
    grid = positions[1:].T.reshape(1, -1, old, old)
    resized = F.interpolate(grid, size=(new, new), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([positions[:1], resized.flatten(2)[0].T])


def _source_name(name: str, depths: tuple[dict[str, int], dict[str, int]]) -> str:
    match = _LAYER.fullmatch(name)
    if match is None:
        return name
    own, others = (side.get(match[1], 0) for side in depths)
    if others == 0:
        return name
    if own > others:
        raise ClipcidError(
            f"--init-from: the student has {own} layers in {match[1].removesuffix('resblocks.')}, the model {others}.",
            "A student inherits from a model at least as deep and wide.",
        )
    return f"{match[1]}{int(evenly_spaced(own, others)[int(match[2])])}{match[3]}"


def _depths(state: dict[str, Any]) -> dict[str, int]:
    depths: dict[str, int] = {}
    for name in state:
        match = _LAYER.fullmatch(name)
        if match is not None:
            depths[match[1]] = max(depths.get(match[1], 0), int(match[2]) + 1)
    return depths


def _heads_by_tower(module: nn.Module) -> dict[str, int]:
    heads: dict[str, int] = {}
    for name, part in module.named_modules():
        if isinstance(part, nn.MultiheadAttention) and _LAYER.fullmatch(f"{name}.attn"):
            heads["image" if name.startswith("visual.") else "text"] = cast(int, part.num_heads)
    return heads
