"""Forward passes that skip what a CLIP's features do not depend on.

Compared with open_clip's own passes three things are skipped; features and gradients stay equal up to rounding:

- Tokens after the one whose row becomes the text's feature. Attention in the text tower is causal, so they change nothing,
  and in a context of 77 most captions, of some 15 tokens, have many of them. The tokens of a batch are packed, one text
  after the other, for everything but attention.
- In the last layer, all rows but the one that becomes the feature: the others are only needed as keys and values.
- Copies that torch.nn.MultiheadAttention makes of queries, keys and values.

Shapes: B texts or images, L tokens, T packed tokens of a batch, W width, H heads, D embedding.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clipcid_cli.errors import ClipcidError

# Largest difference to open_clip's own features, as a share of the largest value, at which they count as equal.
_TOLERANCE = 1e-3
_CHECKED = 2


class ShortForward:
    """Encodes images and texts with an open_clip model, by the short passes where they support its structure.

    At its first call each tower is compared with open_clip's own pass on a few rows; where they differ (another version of
    open_clip, a modified tower) or the structure is another, open_clip's own pass is used.

    Attributes:
        image_is_short: Whether images take the short pass.
        text_is_short: Whether texts do.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module: Any = module
        self._text: Any = getattr(module, "text", module)
        self.image_is_short = _supports_images(self._module.visual)
        self.text_is_short = _supports_texts(self._text)
        self._image_checked = self._text_checked = False
        self._checking = threading.Lock()

    def __call__(self, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Embed images and texts, as `encode_images` and `encode_texts` do."""
        return self.encode_images(pixels), self.encode_texts(tokens)

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Embed images.

        Args:
            pixels: Normalised, float32 [B, 3, height, width], on the model's device.

        Returns:
            Features [B, D], not normalised, with gradients; `encode_image` of the model up to rounding.
        """
        self._check_images(pixels)
        if not self.image_is_short:
            return cast(Tensor, self._module.encode_image(pixels))
        return self._encode_images(pixels)

    @property
    def num_patches(self) -> int | None:
        """Patches of an image, of which some can be hidden; None where the image tower has none of that kind."""
        visual = self._module.visual
        if not _supports_images(visual) or not isinstance(visual.patch_dropout, nn.Identity):
            return None
        height, width = visual.grid_size
        return int(height * width)

    def encode_masked_images(self, pixels: Tensor, kept_Bn: Tensor) -> Tensor:
        """Embed images from some of their patches; the others do not enter the tower.

        Args:
            pixels: As `encode_images` takes them.
            kept_Bn: Numbers of the patches that are seen, int64 [B, n], in [0, `num_patches`).

        Returns:
            Features [B, D], not normalised, with gradients.
        """
        self._check_images(pixels)
        _require("masked images", self.image_is_short)
        return self._encode_images(pixels, kept_Bn)

    def encode_texts(self, tokens: Tensor) -> Tensor:
        """Embed texts.

        Args:
            tokens: int64 [B, L] as the tokenizer gives them; on the CPU, where counting them costs no wait.

        Returns:
            Features [B, D], not normalised, with gradients; `encode_text` of the model up to rounding.
        """
        self._check_texts(tokens)
        if not self.text_is_short:
            return self._encode_texts_in_full(tokens)
        return self._encode_texts(tokens)

    def check(self, pixels: Tensor, tokens: Tensor) -> None:
        """Compare both towers with open_clip's passes now, while weights are float32, and not at the first call.

        Args:
            pixels: As `encode_images` takes them.
            tokens: As `encode_texts` takes them.
        """
        self._check_images(pixels)
        self._check_texts(tokens)

    # Several threads may encode: all wait for the first one's comparison.
    def _check_images(self, pixels: Tensor) -> None:
        if self._image_checked:
            return
        with self._checking:
            if self.image_is_short and not self._image_checked:
                self.image_is_short = self._agrees(self._encode_images, self._module.encode_image, pixels[:_CHECKED])
            self._image_checked = True

    def _check_texts(self, tokens: Tensor) -> None:
        if self._text_checked:
            return
        with self._checking:
            if self.text_is_short and not self._text_checked:
                self.text_is_short = self._agrees(self._encode_texts, self._encode_texts_in_full, tokens[:_CHECKED])
            self._text_checked = True

    def _agrees(self, short: Any, full: Any, rows: Tensor) -> bool:
        # Each module's own mode: a frozen tower is in evaluation mode while the other trains.
        training = [part for part in self._module.modules() if part.training]
        self._module.eval()
        try:
            # The model's device, not the rows': tokens are on the CPU, whatever autocast the model runs under.
            with torch.no_grad(), torch.autocast(self._module.logit_scale.device.type, enabled=False):
                expected = full(rows)
                difference = (short(rows) - expected).abs().max()
        finally:
            for part in training:
                part.training = True
        return bool(difference <= _TOLERANCE * expected.abs().max())

    @property
    def has_tokens(self) -> bool:
        """Whether `encode_tokens` knows both towers."""
        return self.num_patches is not None and _supports_texts(self._text)

    def encode_tokens(self, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Embed images and texts, and each patch and token.

        Returns:
            Features of images and texts as `encode_images` and `encode_texts` give them, up to rounding; those of each
            patch, [B, P, D], and of each token up to the text's last, [B, L, D], then zeros: rows of the last layer, taken
            the same way as the one that becomes the feature.
        """
        self.check(pixels, tokens)
        _require("features of patches and tokens", self.image_is_short and self.text_is_short)
        image_BLD = self._encode_whole_images(pixels)
        text_BD, text_BLD = self._encode_whole_texts(tokens)
        return image_BLD[:, 0], text_BD, image_BLD[:, 1:], text_BLD

    def _encode_whole_images(self, pixels: Tensor) -> Tensor:
        visual = self._module.visual
        layers = [partial(_pass_block, block) for block in visual.transformer.resblocks]
        rows_BLW = visual.ln_post(_pass_layers(visual.transformer, layers, visual._embeds(pixels)))
        return cast(Tensor, rows_BLW if visual.proj is None else rows_BLW @ visual.proj)

    def _encode_whole_texts(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Embed texts, [B, D], and their tokens, [B, L, D]."""
        text = self._text
        packing = _pack(tokens, text, self._module.logit_scale.device)
        layers = [partial(_pass_block, block, packing=packing) for block in text.transformer.resblocks]
        x_TW = text.ln_final(_pass_layers(text.transformer, layers, _embed_texts(text, packing)))
        rows_TD = _project_texts(text, x_TW)
        rows_BlD = packing.spread(rows_TD)
        whole_BLD = F.pad(rows_BlD, (0, 0, 0, tokens.shape[1] - rows_BlD.shape[1]))
        return rows_TD.index_select(0, packing.ends_B), whole_BLD

    def _encode_images(self, pixels: Tensor, kept_Bn: Tensor | None = None) -> Tensor:
        visual = self._module.visual
        x_BLW = visual._embeds(pixels)
        if kept_Bn is not None:
            # The class token comes first; positions are in the rows already.
            places_BL = F.pad(kept_Bn + 1, (1, 0))
            x_BLW = x_BLW.gather(1, places_BL[:, :, None].expand(-1, -1, x_BLW.shape[2]))
        *blocks, last = visual.transformer.resblocks
        layers = [partial(_pass_block, block) for block in blocks]

        def pool(x_BLW: Tensor) -> Tensor:
            normed = last.ln_1(x_BLW)
            return _finish_block(last, x_BLW[:, 0], _attend_from(last, normed, normed[:, 0]))

        pooled = visual.ln_post(_pass_layers(visual.transformer, [*layers, pool], x_BLW))
        return cast(Tensor, pooled if visual.proj is None else pooled @ visual.proj)

    def _encode_texts_in_full(self, tokens: Tensor) -> Tensor:
        return cast(Tensor, self._module.encode_text(tokens.to(self._module.logit_scale.device)))

    def _encode_texts(self, tokens: Tensor) -> Tensor:
        text = self._text
        packing = _pack(tokens, text, self._module.logit_scale.device)
        x_TW = _embed_texts(text, packing)
        *blocks, last = text.transformer.resblocks
        layers = [partial(_pass_block, block, packing=packing) for block in blocks]

        def pool(x_TW: Tensor) -> Tensor:
            normed = last.ln_1(x_TW)
            attended = _attend_from(last, normed, normed.index_select(0, packing.ends_B), packing)
            return _finish_block(last, x_TW.index_select(0, packing.ends_B), attended)

        return _project_texts(text, text.ln_final(_pass_layers(text.transformer, [*layers, pool], x_TW)))


def _require(what: str, is_short: bool) -> None:
    if not is_short:
        raise ClipcidError(
            f"The {what} of this model cannot be computed: its own forward pass gives other features than ours.",
            "Use another model, or leave out the losses td and mfd.",
        )


@dataclasses.dataclass(frozen=True)
class _Packing:
    """Texts one after the other, each up to the token whose row becomes its feature.

    Attributes:
        tokens_T: int64 [T].
        positions_T: Place of each in its text, int64 [T].
        ends_B: Place of each text's last token among the T, int64 [B].
        places_T: Position of each token in [B · longest], int64 [T]; None where all texts are equally long.
        valid_BL: Which of the [B, longest] places hold a token; bool.
    """

    tokens_T: Tensor
    positions_T: Tensor
    ends_B: Tensor
    places_T: Tensor | None
    valid_BL: Tensor

    def spread(self, rows_TW: Tensor) -> Tensor:
        """Unpack rows to [B, longest, W], with zeros after each text's end."""
        batch, longest = self.valid_BL.shape
        if self.places_T is None:
            return rows_TW.view(batch, longest, -1)
        spread = rows_TW.new_zeros(batch * longest, rows_TW.shape[1]).index_copy_(0, self.places_T, rows_TW)
        return spread.view(batch, longest, -1)

    def collect(self, rows_BLW: Tensor) -> Tensor:
        """Undo `spread`."""
        rows = rows_BLW.flatten(0, 1)
        return rows if self.places_T is None else rows.index_select(0, self.places_T)


def _pack(tokens: Tensor, text: Any, device: torch.device) -> _Packing:
    tokens = tokens.cpu()
    pool, eos = _pooling(text)
    ends = (tokens if pool == "argmax" else tokens.eq(cast(int, eos)).int()).argmax(dim=1)
    longest = int(ends.max()) + 1
    valid_BL = torch.arange(longest) <= ends[:, None]
    places_T = valid_BL.flatten().nonzero().squeeze(1)
    return _Packing(
        tokens[:, :longest][valid_BL].to(device, non_blocking=True),
        (places_T % longest).to(device, non_blocking=True),
        (torch.cumsum(ends + 1, 0) - 1).to(device, non_blocking=True),
        None if len(places_T) == valid_BL.numel() else places_T.to(device, non_blocking=True),
        valid_BL.to(device, non_blocking=True),
    )


def _embed_texts(text: Any, packing: _Packing) -> Tensor:
    embedded: Tensor = text.token_embedding(packing.tokens_T)
    return embedded + F.embedding(packing.positions_T, text.positional_embedding)


def _project_texts(text: Any, rows: Tensor) -> Tensor:
    projection = text.text_projection
    if projection is None:
        return rows
    return cast(Tensor, projection(rows) if isinstance(projection, nn.Linear) else rows @ projection)


def _pass_layers(transformer: Any, layers: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> Tensor:
    """One layer after the other; with gradient checkpointing only the input of each is kept for the backward pass."""
    for layer in layers:
        # Nothing in a layer is random, so there is no generator's state to restore.
        again = transformer.grad_checkpointing
        x = checkpoint(layer, x, use_reentrant=False, preserve_rng_state=False) if again else layer(x)
    return x


def _pass_block(block: Any, x: Tensor, packing: _Packing | None = None) -> Tensor:
    return _finish_block(block, x, _attend(block, block.ln_1(x), packing))


def _attend(block: Any, normed: Tensor, packing: _Packing | None = None) -> Tensor:
    """Attend from each row of an image to all its rows, or of a packed text's to the earlier ones, before the projection."""
    attention = block.attn
    projected = F.linear(normed, attention.in_proj_weight, attention.in_proj_bias)
    if packing is not None:
        projected = packing.spread(projected)
    queries, keys, values = projected.chunk(3, dim=-1)
    attended = _attend_by_heads(attention.num_heads, queries, keys, values, is_causal=packing is not None)
    return attended if packing is None else packing.collect(attended)


def _attend_from(block: Any, normed: Tensor, chosen_BW: Tensor, packing: _Packing | None = None) -> Tensor:
    """Attention of one row of each image or text to all its rows; [B, W] before the output projection."""
    attention, width = block.attn, chosen_BW.shape[1]
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    queries = F.linear(chosen_BW, weight[:width], None if bias is None else bias[:width])[:, None]
    both = F.linear(normed, weight[width:], None if bias is None else bias[width:])
    if packing is not None:
        both = packing.spread(both)
    # Computed here: PyTorch's attention of a single row gives other bits for another number of threads.
    heads = attention.num_heads
    queries, keys, values = (rows.view(*rows.shape[:2], heads, -1) for rows in (queries, *both.chunk(2, dim=-1)))
    scores_BLH = (queries * queries.shape[3] ** -0.5 * keys).sum(dim=3)
    if packing is not None:
        scores_BLH = scores_BLH.masked_fill(~packing.valid_BL[:, :, None], -torch.inf)
    attended: Tensor = (scores_BLH.softmax(dim=1)[..., None] * values).sum(dim=1).flatten(1).to(values.dtype)
    return attended


def _attend_by_heads(
    heads: int,
    queries_BLW: Tensor,
    keys_BLW: Tensor,
    values_BLW: Tensor,
    *,
    is_causal: bool,
) -> Tensor:
    queries, keys, values = (
        rows.view(*rows.shape[:2], heads, -1).transpose(1, 2) for rows in (queries_BLW, keys_BLW, values_BLW)
    )
    attended = F.scaled_dot_product_attention(queries, keys, values, is_causal=is_causal)
    return attended.transpose(1, 2).flatten(2)


def _finish_block(block: Any, x: Tensor, attended: Tensor) -> Tensor:
    """The part of a block after attention: projection, residual, MLP."""
    x = x + block.ls_1(block.attn.out_proj(attended))
    return cast(Tensor, x + block.ls_2(block.mlp(block.ln_2(x))))


def _supports_images(visual: Any) -> bool:
    return (
        type(visual).__name__ == "VisionTransformer"
        and type(visual).__module__ == "open_clip.transformer"
        and visual.attn_pool is None
        and visual.pool_type == "tok"
        and not visual.output_tokens
        and hasattr(visual, "_embeds")
        and _supports_blocks(visual.transformer)
    )


def _supports_texts(text: Any) -> bool:
    if not hasattr(text, "transformer") or not hasattr(text, "attn_mask") or text.attn_mask is None:
        return False
    mask = text.attn_mask
    causal = torch.full_like(mask, float("-inf")).triu_(1)
    return (
        getattr(text, "cls_emb", None) is None
        and not getattr(text, "use_pad_mask", False)
        and not getattr(text, "output_tokens", False)
        and _pooling(text)[0] in ("argmax", "eos")
        and torch.equal(mask, causal)
        and _supports_blocks(text.transformer)
    )


def _pooling(text: Any) -> tuple[str, int | None]:
    """Return how a text's feature is chosen and which token ends a text; CLIP and its text tower name them differently."""
    if hasattr(text, "text_pool_type"):
        return text.text_pool_type, getattr(text, "text_eos_id", None)
    return text.pool_type, getattr(text, "eos_id", None)


def _supports_blocks(transformer: Any) -> bool:
    return bool(getattr(transformer, "batch_first", False)) and all(
        type(block).__name__ == "ResidualAttentionBlock"
        and type(block.attn) is nn.MultiheadAttention
        and block.attn.in_proj_weight is not None
        and block.attn.bias_k is None
        and not block.attn.add_zero_attn
        and block.attn.dropout == 0.0
        for block in transformer.resblocks
    )
