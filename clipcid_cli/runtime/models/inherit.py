"""Initialises a small CLIP from a large one's weights: evenly spaced layers, heads and channels.

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

_LAYER = re.compile(r"(.*resblocks)\.(\d+)(\..*)")
# Axes of each tensor of an open_clip transformer, by the end of its name: w width of the residual stream, h heads × head
# width, q the same for queries, keys and values, m width of the MLP, d width of the embedding, p positions; = must be equal.
# Attention pooling is not among them: it has heads of its own number, and its width is the embedding's.
_AXES = {
    re.compile(rf"(?!.*\.attn_pool)(.*\.)?({names})"): axes
    for names, axes in {
        r"attn\.in_proj_weight": "qw",
        r"attn\.in_proj_bias": "q",
        r"attn\.out_proj\.weight": "wh",
        r"mlp\.c_fc\.weight": "mw",
        r"mlp\.c_fc\.bias": "m",
        r"mlp\.c_proj\.weight": "wm",
        r"(attn\.out_proj|mlp\.c_proj)\.bias|ln_\w+\.(weight|bias)|ls_\d\.gamma|class_embedding": "w",
        r"conv1\.weight": "w===",
        r"positional_embedding": "pw",
        r"token_embedding\.weight": "=w",
        r"visual\.proj|text_projection": "wd",
    }.items()
}


def inherit(student: nn.Module, source: nn.Module, towers: str) -> list[str]:
    """Fill a student's ``image``, ``text`` or ``both`` towers from a larger model of the same kind, in place.

    Returns:
        Names of the tensors that stay as they were: other patch sizes, other vocabularies, attention pooling.
    """
    found = source.state_dict()
    left = list[str]()
    filled = list[str]()
    for name, tensor in student.state_dict().items():
        tower = "image" if name.startswith("visual.") else "text"
        if name in ("logit_scale", "logit_bias") or towers not in ("both", tower):
            continue
        taken = _take(name, tensor.shape, student, source, found)
        if taken is not None:
            tensor.copy_(taken)
        (left if taken is None else filled).append(name)
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


def _take(
    name: str, shape: torch.Size, student: nn.Module, source: nn.Module, found: dict[str, Tensor]
) -> Tensor | None:
    """Take what a tensor of the student inherits; None where it inherits nothing."""
    heads = (1, 1)
    from_name = name
    layer = _LAYER.fullmatch(name)
    axes = next((axes for names, axes in _AXES.items() if names.fullmatch(name)), None)
    if layer is not None and axes is not None:
        if not any(other.startswith(layer[1]) for other in found):
            return None
        own, others = (cast(Any, model.get_submodule(layer[1])) for model in (student, source))
        if len(own) > len(others):
            tower = layer[1].removesuffix(".resblocks")
            raise _smaller(f"the student has {len(own)} layers in {tower}, the model {len(others)}")
        from_name = f"{layer[1]}.{int(evenly_spaced(len(own), len(others))[int(layer[2])])}{layer[3]}"
        heads = (own[0].attn.num_heads, others[0].attn.num_heads)
    if from_name not in found or axes is None or len(axes) != found[from_name].ndim:
        return None
    taken = found[from_name]
    if axes[0] == "p":
        taken = _resize_positions(taken, shape[0], is_image=name.startswith("visual."))
    for axis, kind in enumerate(axes):
        count, available = shape[axis], taken.shape[axis]
        if kind == "=" and count != available:
            return None
        if count > available:
            raise _smaller(f"{name} is {tuple(taken.shape)} there and {tuple(shape)} in the student, which is larger")
        if count < available:
            taken = taken.index_select(axis, _choose(kind, count, available, heads))
    return taken


def _smaller(what: str) -> ClipcidError:
    return ClipcidError(f"--init-from: {what}.", "A student inherits from a model at least as deep and wide.")


def _choose(kind: str, count: int, available: int, heads: tuple[int, int]) -> Tensor:
    """Choose channels of an axis: evenly spaced ones, but of queries, keys, values and heads each for itself."""
    if kind == "q":
        one = _choose("h", count // 3, available // 3, heads)
        return torch.cat([one + part * (available // 3) for part in range(3)])
    own, others = heads
    width, source_width = count // own, available // others
    if kind != "h" or own > others or width > source_width:
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
