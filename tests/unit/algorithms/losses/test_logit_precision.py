"""What logits in TF32 would do to the losses: the reason why their products are in float32 on GPUs, too.

TF32 keeps 10 bits of a factor's fraction (float32 23, bfloat16 7) and adds products up in float32: that is emulated here, in
the forward and the backward pass. Logits of pairs in the batch would bear it, but are few beside the towers' products; those
of a million centroids are many, and would not: features in bfloat16, as towers return them, move that gradient far less.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loss_data import compute
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from clipcid_cli.algorithms.losses.batch import LossBatch
from clipcid_cli.algorithms.losses.cluster import cluster_targets, draw_candidates

B, D, K = 128, 256, 2048
# Of losses whose logits are of pairs in the batch. `instance` and others are made of the same products.
IN_BATCH = ("clip", "instance", "crd", "vrd", "xrd", "affinity")


class RoundedProducts(TorchDispatchMode):
    """Rounds the factors of every matrix product to TF32."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name in ("aten::mm", "aten::bmm"):
            args = tuple(to_tf32(value) for value in args)
        elif name == "aten::addmm":
            args = (args[0], *(to_tf32(value) for value in args[1:]))
        return func(*args, **(kwargs or {}))


def to_tf32(values: Tensor) -> Tensor:
    """Round float32 to the nearest number with 10 bits of fraction, ties to even."""
    bits = values.contiguous().view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


def gradient(name: str, noise: float, scale: float, feature: Callable[[Tensor], Tensor], rounded: bool) -> Tensor:
    """Return a loss's gradient by the student's features, [2·B·D], for a student that is the teacher with noise.

    Args:
        noise: Length of what is added to each unit row.
        feature: What the towers' number format does to the features.
    """
    random = torch.Generator().manual_seed(0)

    def near(rows: Tensor, distance: float) -> Tensor:
        return F.normalize(rows + distance * torch.randn(rows.shape, generator=random) / D**0.5, dim=1)

    centroids = F.normalize(torch.randn(K, D, generator=random), dim=1)
    t = near(centroids[torch.randint(0, K, (B,), generator=random)], 0.75)
    u = near(t, 1.0)
    s, v = (feature(near(rows, noise)).requires_grad_() for rows in (t, u))
    similarity, top = (t @ centroids.T).topk(16, dim=1)
    candidates = draw_candidates(top.numpy(), K, ratio=0.1, minimum=K, seed=0)
    chosen = centroids[torch.from_numpy(candidates.ids)]
    targets = cluster_targets(candidates, chosen, top.numpy(), similarity.numpy(), temperature=0.05, label_share=0.5)
    batch = LossBatch(s, v, torch.tensor(scale), s, v, t, u, 100.0, image_clusters=targets)
    with RoundedProducts() if rounded else nullcontext():
        compute(name, batch, torch.tensor(scale)).backward()  # type: ignore[no-untyped-call]
    return torch.cat([torch.zeros_like(rows) if rows.grad is None else rows.grad for rows in (s, v)]).flatten()


def relative_errors(name: str, noise: float, scale: float) -> tuple[float, float]:
    """Return how far TF32 products, and features in bfloat16, move a gradient, by its length."""
    exact = gradient(name, noise, scale, lambda rows: rows, False)
    by_tf32 = gradient(name, noise, scale, lambda rows: rows, True)
    by_bfloat16 = gradient(name, noise, scale, lambda rows: rows.bfloat16().float(), False)
    return tuple(float((found - exact).norm() / exact.norm()) for found in (by_tf32, by_bfloat16))  # type: ignore[return-value]


@pytest.mark.parametrize("scale", [14.3, 100.0])
@pytest.mark.parametrize("name", IN_BATCH)
def test_tf32_would_move_gradients_of_pairs_by_less_than_a_five_hundredth(name: str, scale: float) -> None:
    assert 0 < relative_errors(name, 2.0, scale)[0] < 2e-3


def test_tf32_would_drown_the_gradient_of_a_small_cluster_loss() -> None:
    """It is Σ(p − q)·c with p ≈ q; the product rounds the c of p, and not those of q, which no product sums."""
    assert relative_errors("cluster", 2.0, 14.3)[0] < 1e-3
    by_tf32, by_bfloat16 = relative_errors("cluster", 0.5, 100.0)
    assert by_tf32 > 1 > 10 * by_bfloat16
