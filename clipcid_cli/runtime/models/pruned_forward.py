"""Forward passes without what a CLIP's features do not depend on; features and gradients stay equal up to rounding.

Left out are tokens after the one whose row becomes the text's feature, since attention in the text tower is causal (most
captions fill a fifth of the context; a batch is packed, one text after the other, for everything but attention, which pads
each text to the longest one of its group), in the last layer all rows but the one that becomes the feature, and copies that
torch.nn.MultiheadAttention makes. A training step of a 14 M student took 529 ms in place of 976 (2 cores).

This repeats what open_clip's modules do inside, in the releases that pyproject.toml admits; its tests compare every kind of
tower. A tower of another kind takes open_clip's own pass.

Shape letters beside those of the map: T packed tokens of a batch, W width, H heads, D embedding.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clipcid_cli.runtime.models.packed_sizes import lengthen, round_up_texts
from clipcid_cli.runtime.pipeline import to_device

# Texts of at most so many tokens attend together, and the longer ones: most captions have fewer than 32 tokens, but hardly a
# batch is without one that fills the context. More groups gain little, and a GPU is given more to launch.
_GROUP_LENGTHS = (16, 32)


class PrunedForward:
    """Encodes with an open_clip model, where its structure is known by the pruned passes: [B, D], not normalised."""

    def __init__(self, module: nn.Module, *, in_few_sizes: bool | None = None) -> None:
        """Look at what kind of towers a model has; `in_few_sizes` packs texts as a GPU takes them, by default on one."""
        self._module: Any = module
        self._visual: Any = module.visual
        self._text: Any = getattr(module, "text", module)
        self.prunes_images = _is_known_image_tower(self._visual)
        self.prunes_texts = _is_known_text_tower(self._text)
        self._in_few_sizes = in_few_sizes

    def __call__(self, pixels: Tensor, tokens: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.encode_images(pixels), None if tokens is None else self.encode_texts(tokens)

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Embed normalised pixels, float32 [B, 3, height, width], on the model's device."""
        if not self.prunes_images:
            return cast(Tensor, self._module.encode_image(pixels))
        return self._image_rows(self._visual._embeds(pixels), pooled=True)

    def encode_texts(self, tokens: Tensor) -> Tensor:
        """Embed tokens, int64 [B, L] as the tokenizer gives them; on the CPU, where counting them costs no wait."""
        device = self._module.logit_scale.device
        if not self.prunes_texts:
            return cast(Tensor, self._module.encode_text(tokens.to(device)))
        # On a CPU each token more takes time, and memory comes in any size.
        in_few_sizes = device.type == "cuda" if self._in_few_sizes is None else self._in_few_sizes
        return self._text_rows(_pack(tokens, self._text, device, in_few_sizes=in_few_sizes), pooled=True)

    @property
    def num_patches(self) -> int | None:
        """Patches of an image, of which some can be hidden; None where the image tower has none of that kind."""
        if not self.prunes_images or not isinstance(self._visual.patch_dropout, nn.Identity):
            return None
        height, width = self._visual.grid_size
        return int(height * width)

    def encode_masked_images(self, pixels: Tensor, kept_Bn: Tensor) -> Tensor:
        """Embed images from some of their patches, int64 [B, n] in [0, `num_patches`); the others do not enter the tower."""
        x_BLW = self._visual._embeds(pixels)
        # The class token comes first; positions are in the rows already.
        places_BL = F.pad(kept_Bn + 1, (1, 0))
        seen_BLW = x_BLW.gather(1, places_BL[:, :, None].expand(-1, -1, x_BLW.shape[2]))
        return self._image_rows(seen_BLW, pooled=True)

    @property
    def has_tokens(self) -> bool:
        return self.num_patches is not None and self.prunes_texts

    def encode_tokens(self, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Embed images and texts, and each patch and token; the model `has_tokens`.

        Returns:
            Features as `encode_images` and `encode_texts` give them, up to rounding; those of each patch, [B, P, D], and of
            each token up to the text's last, [B, L, D], then zeros, taken the same way from the rows of the last layer.
        """
        image_BLD = self._image_rows(self._visual._embeds(pixels), pooled=False)
        packing = _pack(tokens, self._text, pixels.device)
        rows_TD = self._text_rows(packing, pooled=False)
        text_BLD = packing.padding.spread(rows_TD)
        unseen = tokens.shape[1] - text_BLD.shape[1]
        return image_BLD[:, 0], packing.take_ends(rows_TD), image_BLD[:, 1:], F.pad(text_BLD, (0, 0, 0, unseen))

    def _image_rows(self, x_BLW: Tensor, *, pooled: bool) -> Tensor:
        """Return the rows of embedded patches, [B, L, D], or only of the class tokens, [B, D]."""
        visual = self._visual
        rows = visual.ln_post(_run_layers(visual.transformer, x_BLW, None, pooled=pooled))
        return cast(Tensor, rows if visual.proj is None else rows @ visual.proj)

    def _text_rows(self, packing: _Packing, *, pooled: bool) -> Tensor:
        """Return the rows of packed tokens, [T, D], or only of the texts' last tokens, [B, D]."""
        text = self._text
        x_TW = text.token_embedding(packing.tokens_T) + F.embedding(packing.positions_T, text.positional_embedding)
        rows = text.ln_final(_run_layers(text.transformer, x_TW, packing, pooled=pooled))
        projection = text.text_projection
        if projection is None:
            return cast(Tensor, rows)
        return cast(Tensor, projection(rows) if isinstance(projection, nn.Linear) else rows @ projection)


@dataclasses.dataclass(frozen=True)
class _Padding:
    """Where packed rows lie when each of some texts has as many places as the longest."""

    places_T: Tensor  # of each row in [texts · longest]
    texts: int  # that there is room for
    longest: int

    def spread(self, rows_TW: Tensor) -> Tensor:
        """Unpack rows to [texts, longest, W], with zeros after each text's end."""
        spread = rows_TW.new_zeros(self.texts * self.longest, rows_TW.shape[1]).index_copy_(0, self.places_T, rows_TW)
        return spread.view(self.texts, self.longest, -1)


@dataclasses.dataclass(frozen=True)
class _Packing:
    """Texts one after the other, those of one group together, each up to the token whose row becomes its feature; int64."""

    tokens_T: Tensor
    positions_T: Tensor  # of each token in its text
    ends_B: Tensor  # of each text's last token among the T
    valid_BL: Tensor  # which of the [B, longest] places hold a token, bool
    padding: _Padding  # of all texts, in the order of the batch
    groups: list[_Padding]  # of texts of about one length, in the order of packing

    def attend(self, projected_TW: Tensor, heads: int) -> Tensor:
        """Attend from each row to those before it in its text."""
        # All rows of a single group are taken as they are, without a copy.
        sizes = [len(group.places_T) for group in self.groups]
        parts = torch.split(projected_TW, sizes) if len(sizes) > 1 else (projected_TW,)
        attended: list[Tensor] = []
        for group, part in zip(self.groups, parts, strict=True):
            rows_BLW = _attend(group.spread(part), heads, is_causal=True)
            attended.append(rows_BLW.flatten(0, 1).index_select(0, group.places_T))
        return torch.cat(attended) if len(attended) > 1 else attended[0]

    def take_ends(self, rows_TW: Tensor) -> Tensor:
        """Return the rows of the texts' last tokens, [B, W]."""
        return rows_TW.index_select(0, self.ends_B)


class _Part(NamedTuple):
    """How the texts of a group are packed."""

    lengths_b: Tensor  # of each text, with what padding is taken along
    longest: int  # places of each text
    texts: int  # that there is room for

    def pad(self, device: torch.device) -> _Padding:
        """Find the places of its rows."""
        places_T = _are_valid(self.lengths_b, self.longest).flatten().nonzero().squeeze(1)
        return _Padding(to_device(places_T, device), self.texts, self.longest)


def _pack(tokens: Tensor, text: Any, device: torch.device, *, in_few_sizes: bool = False) -> _Packing:
    """Pack a batch of texts; `in_few_sizes` with some of the padding after them, so that batches have the same shapes."""
    tokens = tokens.cpu()
    pool, end = _pooling(text)
    lengths_B = (tokens if pool == "argmax" else tokens.eq(cast(int, end)).int()).argmax(dim=1) + 1
    groups_B = torch.bucketize(lengths_B, torch.tensor(_GROUP_LENGTHS))
    order_B = groups_B.argsort(stable=True)
    texts, context = tokens.shape
    parts = list[_Part]()
    sizes = groups_B.bincount().tolist()
    for lengths_b, most in zip(torch.split(lengths_B[order_B], sizes), (*_GROUP_LENGTHS, context), strict=False):
        if not len(lengths_b):
            continue
        if in_few_sizes:
            most = min(most, context)
            parts.append(_Part(lengthen(lengths_b, most, texts), most, round_up_texts(len(lengths_b), texts)))
        else:
            parts.append(_Part(lengths_b, int(lengths_b.max()), len(lengths_b)))
    longest = parts[-1].longest
    packed_B = torch.cat([part.lengths_b for part in parts])
    ends_B = torch.empty_like(lengths_B)
    ends_B[order_B] = packed_B.cumsum(0) - packed_B + lengths_B[order_B] - 1
    row_T, positions_T = _are_valid(packed_B, longest).nonzero(as_tuple=True)
    texts_T = order_B[row_T]
    padding = _Padding(to_device(texts_T * longest + positions_T, device), texts, longest)
    return _Packing(
        tokens_T=to_device(tokens[texts_T, positions_T], device),
        positions_T=to_device(positions_T, device),
        ends_B=to_device(ends_B, device),
        valid_BL=to_device(_are_valid(lengths_B, longest), device),
        padding=padding,
        groups=[part.pad(device) for part in parts] if len(parts) > 1 else [padding],
    )


def _are_valid(lengths_B: Tensor, longest: int) -> Tensor:
    """Tell which of the places of each text hold a token, bool [B, longest]."""
    return torch.arange(longest) < lengths_B[:, None]


def _run_layers(transformer: Any, x: Tensor, packing: _Packing | None, *, pooled: bool) -> Tensor:
    """Pass all layers: rows of images, [B, L, W], or packed ones of texts, [T, W]; `pooled` gives features' rows, [B, W]."""
    *blocks, last = transformer.resblocks
    layers = [partial(_run_block, block, packing=packing) for block in blocks]
    layers.append(partial(_run_pooled_block if pooled else _run_block, last, packing=packing))
    for layer in layers:
        # With checkpoints only the input of a layer is kept. Nothing in one is random: no generator's state to restore.
        again = transformer.grad_checkpointing
        x = checkpoint(layer, x, use_reentrant=False, preserve_rng_state=False) if again else layer(x)
    return x


def _run_block(block: Any, x: Tensor, packing: _Packing | None) -> Tensor:
    """Attend from each row of an image to all its rows, or from a packed text's to those before it."""
    attention = block.attn
    projected = F.linear(block.ln_1(x), attention.in_proj_weight, attention.in_proj_bias)
    if packing is None:
        attended = _attend(projected, attention.num_heads, is_causal=False)
    else:
        attended = packing.attend(projected, attention.num_heads)
    return _finish_block(block, x, attended)


def _attend(projected_BLW: Tensor, heads: int, *, is_causal: bool) -> Tensor:
    queries, keys, values = projected_BLW.chunk(3, dim=-1)
    shape = (*queries.shape[:2], heads, -1)
    attended = F.scaled_dot_product_attention(
        queries.view(shape).transpose(1, 2),
        keys.view(shape).transpose(1, 2),
        values.view(shape).transpose(1, 2),
        is_causal=is_causal,
    )
    return attended.transpose(1, 2).flatten(2)


def _run_pooled_block(block: Any, x: Tensor, packing: _Packing | None) -> Tensor:
    """Attend from the one row of each image or text that becomes its feature."""
    attention = block.attn
    normed = block.ln_1(x)
    width = x.shape[-1]
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    others = F.linear(normed, weight[width:], bias[width:])
    if packing is None:
        x_BW, normed_BW = x[:, 0], normed[:, 0]
    else:
        x_BW, normed_BW = packing.take_ends(x), packing.take_ends(normed)
        others = packing.padding.spread(others)
    query_BW = F.linear(normed_BW, weight[:width], bias[:width])
    keys_BLW, values_BLW = others.chunk(2, dim=-1)
    shape = (*keys_BLW.shape[:2], attention.num_heads, -1)
    keys, values = keys_BLW.view(shape), values_BLW.view(shape)
    queries = query_BW.view(len(query_BW), 1, *keys.shape[2:])
    # Computed here: PyTorch's attention of a single row gives other bits for another number of threads.
    scores_BLH = (queries * queries.shape[3] ** -0.5 * keys).sum(dim=3)
    if packing is not None:
        scores_BLH = scores_BLH.masked_fill(~packing.valid_BL[:, :, None], -torch.inf)
    attended_BHw = (scores_BLH.softmax(dim=1)[..., None] * values).sum(dim=1)
    return _finish_block(block, x_BW, attended_BHw.flatten(1).to(values.dtype))


def _finish_block(block: Any, x: Tensor, attended: Tensor) -> Tensor:
    """Pass the part of a block after attention: projection, residual, MLP."""
    x = x + block.ls_1(block.attn.out_proj(attended))
    return cast(Tensor, x + block.ls_2(block.mlp(block.ln_2(x))))


def _is_known_image_tower(visual: Any) -> bool:
    return (
        type(visual).__name__ == "VisionTransformer"
        and type(visual).__module__ == "open_clip.transformer"
        and visual.attn_pool is None
        and visual.pool_type == "tok"
        and not visual.output_tokens
        and _has_known_blocks(visual.transformer)
    )


def _is_known_text_tower(text: Any) -> bool:
    return (
        getattr(text, "attn_mask", None) is not None  # without a causal mask there is none
        and getattr(text, "cls_emb", None) is None
        and not getattr(text, "output_tokens", False)
        and _pooling(text)[0] in ("argmax", "eos")
        and _has_known_blocks(text.transformer)
    )


def _pooling(text: Any) -> tuple[str, int | None]:
    """Return how a text's feature is chosen and which token ends a text; CLIP and its text tower name them differently."""
    if hasattr(text, "text_pool_type"):
        return text.text_pool_type, getattr(text, "text_eos_id", None)
    return text.pool_type, getattr(text, "eos_id", None)


def _has_known_blocks(transformer: Any) -> bool:
    for block in transformer.resblocks:
        if type(block).__name__ != "ResidualAttentionBlock" or not is_plain_attention(block.attn):
            return False
    return True


def is_plain_attention(module: Any) -> bool:
    """Tell whether this is CLIP's attention: PyTorch's module, or open_clip 4's own with the same weights and no more."""
    if isinstance(module, nn.MultiheadAttention):
        return True
    return (
        type(module).__name__ == "Attention"
        and type(module).__module__ == "open_clip.transformer"
        and module.in_proj_weight is not None
        and module.in_proj_bias is not None
        and module.logit_scale is None
        and module.head_scale is None
        and all(isinstance(norm, nn.Identity) for norm in (module.ln_q, module.ln_k, module.ln_inner))
        and not module.attn_drop.p
        and not module.out_drop.p
    )
