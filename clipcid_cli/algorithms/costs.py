"""What a CLIP takes, by formulas without PyTorch: parameters, operations, bytes moved and bytes kept.

An operation is a multiplication or an addition. Products and passes over memory follow one another on a device, so
their times add up. The formulas are explained in docs/gpu.md#what-is-computed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from clipcid_cli.errors import ClipcidError

TOKENS_OF_CAPTION = 20
"""Tokens of a caption from the web with its two ends, assumed; no more of the context is encoded."""

BATCH_OF_DEVICE = 512
"""Samples a device trains on in a step, where nothing else is said."""

# In rows of the width: what a layer reads and writes in the forward pass (two norms 4, products 4 + 2 + 10, attention 4,
# residuals 6, the MLP's activation 8).
_MOVED = 38
# Bytes of a number under autocast, where norms and residuals stay in float32; of one in float32.
_MIXED_BYTES, _FULL_BYTES = 3, 4
# Bytes that a layer keeps for the backward pass, in rows of the width: what norms read (2 numbers of 4 bytes), and what
# products, attention and the MLP's activation read (14 of 2 bytes under autocast). Of a layer that is computed again, its
# input.
_MIXED_KEPT, _FULL_KEPT, _INPUT_KEPT = 36, 64, 4
# Of an MLP in 16 bits: its input before and after the norm, four times the width before and after the activation.
_LAYER_HELD = 22
# The backward pass has two products for each one of the forward pass, and moves twice as much.
_WITH_BACKWARD = 3
# What the optimiser reads and writes of a parameter: itself, its gradient, its moments.
_BYTES_OF_UPDATE = 28
# Products of a process's rows with all rows of the batch, by the default losses: two each for `clip`, `icl` and `crd`, and
# two of the teacher's rows in `crd`, which have no backward pass.
_SIMILARITIES = 6 + 2 / 3
_TOWERS = 2
# The cluster loss on a GPU makes each product of three of half precision (``losses/half_products.py``), and reads and writes
# so many bytes for each logit: 36 in the forward pass, 56 in the backward pass.
_PARTS = 3
_BYTES_OF_LOGIT = 92
# Rounds of Muon, each with two products of a × b matrices and one of a × a (``training/optimisers.py``).
_ROUNDS = 5
# Weights, gradients, two moments (one of Muon's matrices), and a copy of the weights in the format of products.
_BYTES_OF_PARAMETER = 18
# Weights and moments.
_BYTES_OF_CHECKPOINT = 12
# A weight in float32 and, in 16 bits, as products read it.
_BYTES_OF_ENCODER = 6

_SUPPORTED = "a CLIP of open_clip's ViT and text transformer, such as ViT-B-32, ViT-B-16 or ViT-L-14"


@dataclasses.dataclass(frozen=True)
class Tower:
    """The transformer of images or of texts."""

    tokens: int  # of a sample that pass through products
    width: int
    layers: int
    hidden: int  # width of the MLP
    embed_dim: int
    patch: int  # values of an image's patch; 0 of texts
    table: int  # parameters of positions and vocabulary

    @property
    def parameters(self) -> int:
        """Number of parameters: tables, layers with their biases and norms, what is before and after them."""
        width, hidden = self.width, self.hidden
        layer = 4 * width * width + 2 * width * hidden + 9 * width + hidden
        first = (self.patch + 3) * width if self.patch else 0  # patches, the class token, a norm
        return self.table + self.layers * layer + first + 2 * width + width * self.embed_dim

    @property
    def operations(self) -> int:
        """Operations of the forward pass of a sample, of products alone.

        The last layer has one row as query and in its MLP: that which becomes the feature.
        """
        width, hidden, tokens = self.width, self.hidden, self.tokens
        layer = 2 * tokens * (4 * width * width + 2 * width * hidden) + 4 * tokens * tokens * width
        last = 4 * tokens * width * width + 4 * width * width + 4 * width * hidden
        patches = 2 * (tokens - 1) * self.patch * width if self.patch else 0
        return (self.layers - 1) * layer + last + patches + 2 * width * self.embed_dim

    @property
    def moved(self) -> int:
        """Numbers that the forward pass of a sample reads and writes."""
        return _MOVED * self.tokens * self.width * (self.layers - 1)

    def kept_bytes(self, *, mixed: bool = True, recomputed: bool = False) -> int:
        """Return the bytes of a sample that wait for the backward pass on a device.

        Args:
            recomputed: Whether layers are computed again in the backward pass: then what waits is the input of each layer,
                and all of one.
        """
        layer = _MIXED_KEPT if mixed else _FULL_KEPT
        kept = _INPUT_KEPT * self.layers + layer if recomputed else layer * self.layers
        return kept * self.tokens * self.width

    def layer_bytes(self) -> int:
        """Return the bytes of a sample that a layer holds at once where nothing is kept: its MLP, in 16 bits."""
        return _LAYER_HELD * self.tokens * self.width

    def matrices(self) -> Iterator[tuple[int, int]]:
        """Yield the sides of the matrices within the layers, the smaller one first."""
        for _ in range(self.layers):
            yield self.width, 3 * self.width
            yield self.width, self.width
            for _ in range(2):
                yield min(self.width, self.hidden), max(self.width, self.hidden)


_NO_TOWER = Tower(tokens=0, width=0, layers=1, hidden=0, embed_dim=0, patch=0, table=0)


@dataclasses.dataclass(frozen=True)
class Clip:
    """Both towers of a model, and its images."""

    image: Tower
    text: Tower
    pixels: int  # of an image as the model sees it

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return self.image.parameters + self.text.parameters + 1  # the logit scale

    @property
    def embed_dim(self) -> int:
        """Width of the embeddings."""
        return self.image.embed_dim

    @property
    def operations(self) -> int:
        """Operations of the forward pass of a pair."""
        return self.image.operations + self.text.operations

    @property
    def training_operations(self) -> int:
        """Operations of the forward and backward pass of a pair."""
        return _WITH_BACKWARD * self.operations

    @property
    def optimizer_operations(self) -> int:
        """Operations of Muon in a step."""
        matrices = (*self.image.matrices(), *self.text.matrices())
        return _ROUNDS * sum(4 * short * short * long + 2 * short**3 for short, long in matrices)

    def image_alone(self, embed_dim: int) -> Clip:
        """Return it without a text tower, for embeddings of another width."""
        return dataclasses.replace(self, image=dataclasses.replace(self.image, embed_dim=embed_dim), text=_NO_TOWER)

    def training_bytes(self, *, mixed: bool = True) -> int:
        """Return the bytes that training on a pair reads and writes besides those of products."""
        return _WITH_BACKWARD * (self.image.moved + self.text.moved) * _bytes_of_number(mixed=mixed)

    def encoding_bytes(self) -> int:
        """Return the bytes that encoding a pair in 16 bits reads and writes."""
        return 2 * (self.image.moved + self.text.moved)

    @property
    def state_bytes(self) -> int:
        """Bytes of weights, gradients and the optimiser's state on a device."""
        return _BYTES_OF_PARAMETER * self.parameters

    @property
    def gradient_bytes(self) -> int:
        """Bytes of gradients that processes send each other."""
        return 4 * self.parameters

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of a checkpoint."""
        return _BYTES_OF_CHECKPOINT * self.parameters

    def kept_bytes(self, *, mixed: bool = True, recomputed: bool = False) -> int:
        """Return the bytes of a pair that wait for the backward pass on a device; see `Tower.kept_bytes`."""
        towers = self.image, self.text
        return sum(tower.kept_bytes(mixed=mixed, recomputed=recomputed) for tower in towers)

    def encoder_bytes(self, at_once: int) -> int:
        """Return the bytes that encoding so many images at once takes on a device: weights, and what a layer holds."""
        return _BYTES_OF_ENCODER * self.parameters + at_once * self.image.layer_bytes()

    @property
    def update_bytes(self) -> int:
        """Bytes that the optimiser reads and writes in a step."""
        return _BYTES_OF_UPDATE * self.parameters

    def loss_operations(self, own: int, batch: int) -> float:
        """Return the operations of the default losses in a step, in float32.

        Args:
            own: Samples of the process.
            batch: Samples of all processes.
        """
        return _WITH_BACKWARD * 2 * own * _SIMILARITIES * batch * self.embed_dim

    def cluster_operations(self, own: int, candidates: int, *, of_parts: bool = False) -> int:
        """Return the operations of the cluster loss of a step: in float32, or those of its parts in half precision."""
        return _WITH_BACKWARD * 2 * own * _TOWERS * candidates * self.embed_dim * (_PARTS if of_parts else 1)

    def cluster_bytes(self, own: int, candidates: int) -> int:
        """Return the bytes that a GPU reads and writes for the cluster loss of a step."""
        return _BYTES_OF_LOGIT * own * _TOWERS * candidates

    @property
    def image_bytes(self) -> int:
        """Bytes of the pixels of an image, as they are copied to a device."""
        return 3 * self.pixels


def describe_clip(config: dict[str, Any], tokens_of_text: int = TOKENS_OF_CAPTION) -> Clip:
    """Read the sizes of a CLIP from open_clip's ``model_cfg``.

    Args:
        tokens_of_text: Of a caption, up to the one whose row becomes its feature; at most the context is counted.
    """
    vision, text = config.get("vision_cfg", {}), config.get("text_cfg", {})
    is_known = bool(vision) and isinstance(vision.get("layers", 12), int) and not vision.get("timm_model_name")
    if not is_known or text.get("hf_model_name"):
        raise ClipcidError(
            "The operations of this model are not known: its towers are of timm, of transformers or of convolutions.",
            f"Plan with {_SUPPORTED}.",
        )
    embed_dim = config["embed_dim"]
    width = vision.get("width", 768)
    patch = vision.get("patch_size", 16)
    height, side = _two(vision.get("image_size", 224))
    patches = (height // _two(patch)[0]) * (side // _two(patch)[1])
    image = Tower(
        tokens=patches + 1,
        width=width,
        layers=vision.get("layers", 12),
        hidden=int(width * vision.get("mlp_ratio", 4.0)),
        embed_dim=embed_dim,
        patch=3 * _two(patch)[0] * _two(patch)[1],
        table=(patches + 1) * width,
    )
    width = text.get("width", 512)
    context = text.get("context_length", 77)
    words = Tower(
        tokens=min(context, tokens_of_text),
        width=width,
        layers=text.get("layers", 12),
        hidden=int(width * text.get("mlp_ratio", 4.0)),
        embed_dim=embed_dim,
        patch=0,
        table=(context + text.get("vocab_size", 49408)) * width,
    )
    return Clip(image, words, height * side)


def _two(side: int | list[int]) -> tuple[int, int]:
    return (side, side) if isinstance(side, int) else (side[0], side[1])


def _bytes_of_number(*, mixed: bool) -> int:
    return _MIXED_BYTES if mixed else _FULL_BYTES
