"""One batch in many parts and processes: features first, their gradients later, the result that of a single process.

A contrastive loss needs the features of the whole batch at once, but not the towers' activations. So `GradCache` has the
losses computed on features detached from the towers, and propagates the gradients of the features through the towers
afterwards. With several parts each part's activations live alone: all but the last part are encoded twice, first without
and then with what the backward pass needs.

Source: Gao et al. 2021 (GradCache, arXiv 2101.06983); open_clip's ``--accum-freq`` does the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

# Gradients are sent in buckets of about this many bytes, so that sending begins while the backward pass still runs.
_BUCKET_BYTES = 25 * 2**20


class Features(NamedTuple):
    """What the student makes of a batch or a part of it, not normalised."""

    image: Tensor  # [b, d]
    text: Tensor | None  # of captions and of e texts without images, [b + e, d]; None where no text tower runs
    masked_image: Tensor | None = None  # of the images by a pass that saw few patches, [b, d]
    image_tokens: Tensor | None = None  # of the images' patches, [b, P, d]
    text_tokens: Tensor | None = None  # of the texts' tokens, [b + e, L, d], zeros after each text's last


class GradCache:
    """One forward and one backward pass over a batch; the same for any number of parts."""

    def __init__(self, encode: Callable[[int], Features], seeds: Sequence[int]) -> None:
        """Encode the batch: each part by its index, with a seed of its own for dropout and the like."""
        self._encode_part = encode
        self._seeds = seeds
        last = len(seeds) - 1
        with torch.no_grad():
            parts = [self._encode(index) for index in range(last)]
        self._last = self._encode(last)
        self._detached = [_detach(part) for part in (*parts, self._last)]
        # The features of all parts, detached from the towers.
        self.features = Features._make(
            None if kind[0] is None else torch.cat(kind) for kind in zip(*self._detached, strict=True)
        )

    def backward(self, before_last: Callable[[], None]) -> None:
        """Propagate the gradients that the losses' backward pass gave the features through the towers.

        `before_last` is called before the last part, after which every gradient is complete.
        """
        # The last part's activations exist already; freed first, they leave room for the others'.
        last = len(self._detached) - 1
        for index in (last, *range(last)):
            if index == max(0, last - 1):
                before_last()
            part = self._last if index == last else self._encode(index)
            pairs = [
                (rows, detached.grad)
                for rows, detached in zip(part, self._detached[index], strict=True)
                if rows is not None and rows.requires_grad and detached is not None and detached.grad is not None
            ]
            if pairs:
                torch.autograd.backward([rows for rows, _ in pairs], [gradient for _, gradient in pairs])

    def _encode(self, index: int) -> Features:
        torch.manual_seed(self._seeds[index])  # nothing to save, nothing to restore
        return self._encode_part(index)


def _detach(part: Features) -> Features:
    return Features._make(None if rows is None else rows.detach().requires_grad_() for rows in part)


def _num_processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_bD: Tensor) -> Tensor:
        size = dist.get_world_size()
        gathered_BD = rows_bD.new_empty(size * len(rows_bD), rows_bD.shape[1])
        dist.all_gather(list(gathered_BD.chunk(size)), rows_bD.contiguous())
        return gathered_BD

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        parts = gradients[0].contiguous().chunk(dist.get_world_size())
        own_bD = torch.empty_like(parts[0])
        dist.reduce_scatter(own_bD, list(parts))
        return own_bD


def gather_rows(rows_bD: Tensor) -> Tensor:
    """Collect the rows of all processes, as many of each, with gradients; PyTorch's functions for it are deprecated.

    When processes compute scalars of them and gradients are averaged over processes, each parameter's gradient is that of
    the scalars' mean, as a single process has it with the whole batch.
    """
    if _num_processes() == 1:
        return rows_bD
    gathered: Tensor = _GatherRows.apply(rows_bD)  # type: ignore[no-untyped-call, unused-ignore]  # untyped in PyTorch 2.13, typed in 2.15
    return gathered


class GradientAverager:
    """Averages gradients over the processes while the backward pass runs.

    DistributedDataParallel regroups parameters into other buckets after its first backward pass; with three or more
    processes that changes the order of gloo's sums, so a resumed run would differ in its last bits from one that was
    never stopped. Here the buckets depend on the parameters only.
    """

    def __init__(self, groups: Sequence[Sequence[nn.Parameter]]) -> None:
        """Hook into the parameters; no bucket has those of two groups.

        Args:
            groups: Those of the towers in the order in which the backward pass reaches them, and at last those that it has
                reached before it is watched.
        """
        self._parameters = [parameter for group in groups for parameter in group]
        self._buckets = [_Bucket(part) for group in groups for part in _cut(group)] if _num_processes() > 1 else []
        self._next = 0
        self._watching = False
        for bucket in self._buckets:
            for parameter in bucket.parameters:
                parameter.register_post_accumulate_grad_hook(partial(self._ready, bucket))  # type: ignore[no-untyped-call]  # torch leaves it untyped

    def watch(self) -> None:
        """Send gradients from now on as they are ready: call before the last backward pass that adds to them."""
        self._watching = True

    def _ready(self, bucket: _Bucket, _: Tensor) -> None:
        if not self._watching:
            return
        bucket.waiting -= 1
        # Collective calls must come in the same order everywhere: a bucket waits for those before it.
        while self._next < len(self._buckets) and self._buckets[self._next].waiting == 0:
            self._buckets[self._next].send()
            self._next += 1

    def finish(self) -> None:
        """Wait until every gradient is the mean over the processes; call after the last backward pass.

        The gradient of a parameter that took no part is zero, so that processes never wait for each other's; with one
        process too, or its student would be another.
        """
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for bucket in self._buckets[self._next :]:
            bucket.send()
        for bucket in self._buckets:
            bucket.receive()
        self._next = 0
        self._watching = False


def _cut(group: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Cut parameters into stretches of about a bucket's size, each of one number format."""
    stretches: list[list[nn.Parameter]] = []
    num_bytes = _BUCKET_BYTES
    for parameter in group:
        if num_bytes >= _BUCKET_BYTES or parameter.dtype != stretches[-1][0].dtype:
            stretches.append([])
            num_bytes = 0
        stretches[-1].append(parameter)
        num_bytes += parameter.numel() * parameter.element_size()
    return stretches


class _Bucket:
    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.waiting = len(parameters)

    def send(self) -> None:
        self._flat = torch.cat([p.grad.reshape(-1) for p in self.parameters if p.grad is not None])
        self._work: Any = dist.all_reduce(self._flat, async_op=True)

    def receive(self) -> None:
        self._work.wait()
        means = torch.split(self._flat.div_(_num_processes()), [parameter.numel() for parameter in self.parameters])
        for parameter, mean in zip(self.parameters, means, strict=True):
            parameter.grad = mean.view_as(parameter)
        self.waiting = len(self.parameters)
        del self._flat


def backward_order(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the parameters of the text and the image tower, each in the order in which their gradients arrive.

    Texts are encoded last, so their tower comes first. Layers arrive from the last to the first; embeddings of tokens and
    positions at the very end, wherever a model defines them.
    """
    towers: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    stems: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for name, parameter in reversed(list(module.named_parameters())):
        (stems if "embed" in name else towers)[name.startswith("visual.")].append(parameter)
    return towers[0] + stems[0], towers[1] + stems[1]
