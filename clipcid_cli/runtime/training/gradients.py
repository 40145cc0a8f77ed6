"""Many processes, one batch: features are gathered and gradients averaged such that the result is a single process's.

Every process computes its own rows' share of the loss from everybody's features, or (``--no-local-loss``) the whole; the
gradient is the whole batch's either way.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

# Gradients are sent in buckets of about this many bytes, so that sending begins while the backward pass still runs.
_BUCKET_BYTES = 25 * 2**20


class _GatherRows(torch.autograd.Function):
    """All processes' rows in order of rank; the gradient of a process's own rows, times the number of processes."""

    @staticmethod
    def forward(ctx: Any, rows_bD: Tensor, shared: bool) -> Tensor:
        ctx.rank, ctx.size, ctx.count = dist.get_rank(), dist.get_world_size(), len(rows_bD)
        ctx.shared = shared
        parts = [torch.empty_like(rows_bD) for _ in range(ctx.size)]
        dist.all_gather(parts, rows_bD.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        start = ctx.rank * ctx.count
        everyone = gradients[0]
        if ctx.shared:
            # Each process holds the gradient of its own share of the loss, times the number of processes: they add up.
            everyone = everyone.contiguous()
            dist.all_reduce(everyone)
            return everyone[start : start + ctx.count], None
        # Every process holds the same loss and so the same gradient of all rows: its own part needs no communication. The
        # factor undoes the mean that `GradientAverager` takes, which is right for parameters used after the gather.
        own: Tensor = everyone[start : start + ctx.count]
        return own * cast(int, ctx.size), None


def gather_rows(rows_bD: Tensor, size: int, *, shared: bool = False) -> Tensor:
    """Collect all processes' rows, with gradients.

    Args:
        rows_bD: This process's rows [b, D]; b and D are the same on every process.
        size: Number of processes; with 1 the rows come back as they are.
        shared: Whether each process computes its share of the loss, times `size`, rather than all of it.

    Returns:
        [size·b, D], in order of rank. When every process computes the same scalar from it (or, `shared`, scalars whose
        mean it is) and gradients are averaged over processes, each parameter's gradient equals a single process's with
        the whole batch.
    """
    if size == 1:
        return rows_bD
    gathered: Tensor = _GatherRows.apply(rows_bD, shared)  # type: ignore[no-untyped-call, unused-ignore]  # untyped in PyTorch 2.13, typed in 2.15
    return gathered


def sum_values(values: Tensor, size: int) -> Tensor:
    """Sum a tensor without gradient over the processes; the same bits on each."""
    if size > 1:
        dist.all_reduce(values)
    return values


class GradientAverager:
    """Averages gradients over the processes while the backward pass runs.

    DistributedDataParallel regroups parameters into other buckets after its first backward pass; with three or more
    processes that changes the order of gloo's sums, so a resumed run would differ in its last bits from one that was
    never stopped. Here the buckets depend on the parameters only.
    """

    def __init__(
        self, towers: Sequence[Sequence[torch.nn.Parameter]], losses: Sequence[torch.nn.Parameter], size: int
    ) -> None:
        """Hook into the parameters.

        Args:
            towers: Parameters of each tower, towers and parameters in the order in which the backward pass reaches them.
            losses: Those the losses' backward pass reaches, before it: their gradients are sent last.
        """
        self._size = size
        self._parameters = [parameter for tower in towers for parameter in tower] + list(losses)
        self._buckets: list[_Bucket] = []
        self._next = 0
        self._watching = False
        if size == 1:
            return
        for tower in towers:
            current: list[torch.nn.Parameter] = []
            for parameter in tower:
                full = sum(p.numel() * p.element_size() for p in current) >= _BUCKET_BYTES
                if current and (full or parameter.dtype != current[0].dtype):
                    self._buckets.append(_Bucket(current))
                    current = []
                current.append(parameter)
            self._buckets += [_Bucket(current)] if current else []
        self._buckets += [_Bucket(list(losses))] if losses else []
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
            self._buckets[self._next].start()
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
            bucket.start()
        for bucket in self._buckets:
            bucket.finish(self._size)
        self._next, self._watching = 0, False


class _Bucket:
    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self.parameters = parameters
        self.waiting = len(parameters)
        self.flat: Tensor | None = None
        self.work: Any = None

    def start(self) -> None:
        self.flat = torch.cat([p.grad.reshape(-1) for p in self.parameters if p.grad is not None])
        self.work = dist.all_reduce(self.flat, async_op=True)

    def finish(self, size: int) -> None:
        assert self.flat is not None
        self.work.wait()
        self.flat.div_(size)
        sizes = [parameter.numel() for parameter in self.parameters]
        for parameter, mean in zip(self.parameters, torch.split(self.flat, sizes), strict=True):
            assert parameter.grad is not None
            parameter.grad.copy_(mean.view_as(parameter))
        self.waiting = len(self.parameters)
        self.flat = None
