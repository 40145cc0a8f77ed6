"""Initialises a small CLIP from a large one's weights: evenly spaced layers, heads and channels.

Source: the idea of Wu et al. 2023 (TinyCLIP, arXiv 2309.12314), manual weight inheritance; which layers, heads and channels
are taken is our choice (theirs are learned or chosen by importance).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipcid_cli.errors import ClipcidError
from clipcid_cli.runtime.models.pruned_forward import is_plain_attention

# Layers of open_clip's own transformers and of timm's ViTs. Their attention stacks the rows of queries, keys and values in
# this order, each head after head; of another no channel is chosen.
_LAYER = re.compile(r"(transformer\.resblocks|trunk\.blocks)\.(\d+)(\..*)")
_TIMM_ATTENTION = "timm.layers.attention.Attention"
# Axes of each tensor, by the end of its name in the tower: w width of the residual stream, h heads × head width, q the same
# for queries, keys and values, k for keys and values, m width of the MLP, d width of the embedding, p positions; = must be
# equal. open_clip's attention pooling is not among them: its heads are of another number, its width is the embedding's.
_AXES = {
    re.compile(rf"(?!attn_pool\.)(.*\.)?({names})"): axes
    for names, axes in {
        r"attn\.(in_proj_|qkv\.)weight": "qw",
        r"attn\.(in_proj_|qkv\.)bias": "q",
        r"attn_pool\.kv\.weight": "kw",
        r"attn_pool\.kv\.bias": "k",
        r"attn_pool\.q\.weight": "hw",
        r"attn_pool\.q\.bias": "h",
        r"attn\.out_proj\.weight|attn(_pool)?\.proj\.weight": "wh",
        r"mlp\.(c_fc|fc1)\.weight": "mw",
        r"mlp\.(c_fc|fc1)\.bias": "m",
        r"mlp\.(c_proj|fc2)\.weight": "wm",
        r"(out_proj|proj|c_proj|fc2)\.bias|(ln_|norm)\w*\.(weight|bias)|ls_?\d\.gamma|class_embedding|cls_emb": "w",
        r"conv1\.weight|patch_embed\.proj\.weight": "w===",
        r"positional_embedding": "pw",
        r"pos_embed": "=pw",
        r"cls_token|attn_pool\.latent": "==w",
        r"token_embedding\.weight": "=w",
        r"proj|text_projection": "wd",
        r"(text_projection|trunk\.head)\.weight": "dw",
        r"(text_projection|trunk\.head)\.bias": "d",
    }.items()
}
_STACKED = {"q": 3, "k": 2}


def inherit(student: nn.Module, source: nn.Module, towers: str) -> list[str]:
    """Fill a student's ``image``, ``text`` or ``both`` towers from a model of the same kind, at least as large, in place.

    A tower of the same sizes is copied whole, whatever its kind.

    Returns:
        What the student has of its own: tensors that stay as they were (other patch sizes, other vocabularies, open_clip's
        attention pooling), and what it computes otherwise with those it took.
    """
    left = list[str]()
    for tower in ("image", "text") if towers == "both" else (towers,):
        parts = _tower(student, tower), _tower(source, tower)
        own, others = map(_tensors, parts)
        is_same = {name: tensor.shape for name, tensor in own.items()} == {
            name: tensor.shape for name, tensor in others.items()
        }
        is_same = is_same and _grid(parts[0]) == _grid(parts[1])
        if not is_same:
            _validate_known(*parts, tower)
        for name, tensor in own.items():
            taken = others[name] if is_same else _take(name, tensor.shape, *parts, others, tower)
            if taken is None:
                left.append(f"{tower} {name}")
            else:
                tensor.copy_(taken)
        here, there = map(_function, parts)
        left += [f"{tower} {what} ({here[what]}, {there[what]} there)" for what in here if here[what] != there[what]]
    return left


def _tower(model: nn.Module, tower: str) -> Any:
    """Return a tower's module; a text tower that is no module of its own is the CLIP itself."""
    return cast(Any, model).visual if tower == "image" else getattr(model, "text", model)


def _tensors(part: nn.Module) -> dict[str, Tensor]:
    others = ("visual.", "logit_scale", "logit_bias")
    return {name: tensor for name, tensor in part.state_dict().items() if not name.startswith(others)}


def _validate_known(own: nn.Module, others: nn.Module, tower: str) -> None:
    """Refuse towers whose tensors are not known by their names and axes."""
    modules = [getattr(block, "attn", None) for part in (own, others) for block in _layers(part)]
    kinds = {f"{type(module).__module__}.{type(module).__name__}" for module in modules}
    is_known = kinds == {_TIMM_ATTENTION} or all(map(is_plain_attention, modules))
    if not (len(_layers(own)) and len(_layers(others)) and len(kinds) == 1 and is_known):
        other = "text" if tower == "image" else "image"
        raise ClipcidError(
            f"--init-from: the {tower} towers of student and model are of different kinds or sizes, and layers and channels "
            "can be chosen only where the attention layout is known: in plain ViTs of open_clip and timm, and in "
            "CLIP's text tower.",
            f"Give the student the model's own {tower} tower, or fill the other one alone: --init-towers {other}.",
        )


def _layers(part: Any) -> Sequence[Any]:
    """Return the layers that `_LAYER` names; none of a tower that has none."""
    transformer, trunk = getattr(part, "transformer", None), getattr(part, "trunk", None)
    return cast(Sequence[Any], getattr(transformer, "resblocks", getattr(trunk, "blocks", ())))


def _function(part: Any) -> dict[str, Any]:
    """Return what a tower computes that the shapes of its tensors do not tell; None for what it has not."""
    trunk = getattr(part, "trunk", part)
    layer = next(iter(_layers(part)), None)
    mlp = getattr(layer, "mlp", None)
    activation = getattr(mlp, "gelu", getattr(mlp, "act", None))
    poolings = (getattr(trunk, name, None) for name in ("global_pool", "text_pool_type", "pool_type"))
    return {
        "activation": None if activation is None else type(activation).__name__,
        "width of heads": getattr(getattr(layer, "attn", None), "head_dim", None),
        "pooling": next((pooling for pooling in poolings if isinstance(pooling, str)), None),
    }


def _grid(part: Any) -> tuple[int, int] | None:
    """Return the rows and columns of patches whose positions a ViT has learned; None of another tower."""
    trunk = getattr(part, "trunk", part)
    if getattr(trunk, "pos_embed", getattr(trunk, "positional_embedding", None)) is None:
        return None
    return getattr(getattr(trunk, "patch_embed", trunk), "grid_size", None)


def evenly_spaced(count: int, available: int) -> Tensor:
    """Return `count` of the numbers 0 … available − 1, the first and last among them; int64, ascending."""
    if count == 1:
        return torch.zeros(1, dtype=torch.int64)
    return torch.linspace(0, available - 1, count, dtype=torch.float64).round().long()


def _take(name: str, shape: torch.Size, own: Any, others: Any, tensors: dict[str, Tensor], tower: str) -> Tensor | None:
    """Take what a tensor of the student's tower inherits; None where it inherits nothing."""
    heads = (1, 1)
    from_name = name
    layer = _LAYER.fullmatch(name)
    axes = next((axes for names, axes in _AXES.items() if names.fullmatch(name)), None)
    if layer is not None:
        layers, other_layers = _layers(own), _layers(others)
        if len(layers) > len(other_layers):
            raise _smaller(f"the student has {len(layers)} layers in its {tower} tower, the model {len(other_layers)}")
        chosen = int(evenly_spaced(len(layers), len(other_layers))[int(layer[2])])
        from_name = f"{layer[1]}.{chosen}{layer[3]}"
        heads = (layers[0].attn.num_heads, other_layers[0].attn.num_heads)
    if from_name not in tensors or axes is None or len(axes) != tensors[from_name].ndim:
        return None
    if "attn_pool" in name:
        heads = (own.trunk.attn_pool.num_heads, others.trunk.attn_pool.num_heads)
    taken = tensors[from_name]
    if "p" in axes:
        positions = taken.flatten(0, -2)
        grids = _grid(own), _grid(others)
        taken = _cut(positions, shape[-2]) if tower == "text" else _resample(positions, shape[-2], *grids)
        taken = taken.view(*shape[:-1], -1)
    for axis, kind in enumerate(axes):
        count, available = shape[axis], taken.shape[axis]
        if kind == "=" and count != available:
            return None
        if count > available:
            raise _smaller(
                f"{tower} {name} is {tuple(taken.shape)} in the model and larger in the student, {tuple(shape)}"
            )
        if count < available:
            taken = taken.index_select(axis, _choose(kind, count, available, heads))
    return taken


def _smaller(what: str) -> ClipcidError:
    return ClipcidError(f"--init-from: {what}.", "A student inherits from a model at least as deep and wide.")


def _choose(kind: str, count: int, available: int, heads: tuple[int, int]) -> Tensor:
    """Choose channels of an axis: evenly spaced ones, but of queries, keys, values and heads each for itself."""
    if kind in _STACKED:
        parts = _STACKED[kind]
        one = _choose("h", count // parts, available // parts, heads)
        return torch.cat([one + part * (available // parts) for part in range(parts)])
    own, others = heads
    width, source_width = count // own, available // others
    if kind != "h" or own > others or width > source_width:
        return evenly_spaced(count, available)
    first = evenly_spaced(own, others) * source_width
    return (first[:, None] + evenly_spaced(width, source_width)[None, :]).reshape(-1)


def _cut(positions: Tensor, count: int) -> Tensor:
    """Take the first of a text's position embeddings [n, w]."""
    if count > len(positions):
        raise ClipcidError(
            f"--init-from: the student's context of {count} tokens is longer than the model's {len(positions)}.",
            "Give the student a shorter context_length, or use --init-towers image.",
        )
    return positions[:count]


def _resample(positions: Tensor, count: int, new: tuple[int, int] | None, old: tuple[int, int] | None) -> Tensor:
    """Resample an image's position embeddings [n, w] from a grid of patches to another; those before them are kept."""
    own, extra = count - math.prod(new or ()), len(positions) - math.prod(old or ())
    if new is None or old is None or own != extra:
        raise ClipcidError(
            f"--init-from: the student's image tower has {count:,} positions for a grid of {new} patches, the model's "
            f"{len(positions):,} for {old}: other tokens, such as a class token, stand before the patches.",
            "Give the student a tower with the model's tokens, or use --init-towers text.",
        )
    if new == old:
        return positions
    grid = positions[extra:].T.reshape(1, -1, *old)
    resized = F.interpolate(grid, size=new, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([positions[:extra], resized.flatten(2)[0].T])
