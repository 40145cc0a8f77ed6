"""A simulated CUDA device: real values on the CPU under ``cuda:0``, and errors where CUDA would raise them.

    with simulated_cuda() as device:
        ...                     # tensors made with device="cuda" live there
        device.operators        # operators that reached the device, by name
        device.waits            # what would have made the host wait for it, by kind
        device.late_waits       # waits for what came before work that the device still had to do
        device.prefetched       # operators in the thread that prefetches, by name
        device.prefetch_waits   # what would have made that thread wait, by kind

Mixed devices, ``.numpy()`` of a device tensor and a CPU generator for a device's draw fail as they would on a GPU; so does
a tensor that was made in another stream which the current one has not waited for. It says nothing of kernels, races within
a stream, memory, NCCL or speed. PyTorch stays changed: use it in a process of its own, and end
that with `os._exit`.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

CUDA = torch.device("cuda", 0)
# Their results' sizes, or values, are read by the host.
WAITING = {
    "aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::equal", "aten::masked_select",
    "aten::unique_dim", "aten::_unique2", "aten::bincount",
}  # fmt: skip
TAKES_CPU_INDEX = {
    "aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index",
}  # fmt: skip
PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"}
COPIES = {"aten::_to_copy", "aten::copy_", "aten::to"}
SOFTMAX = {"aten::_softmax", "aten::_log_softmax"}
SOFTMAX_BACKWARD = {"aten::_softmax_backward_data", "aten::_log_softmax_backward_data"}


class DeviceTensor(torch.Tensor):
    """A tensor that says it is on ``cuda:0``; `held` has its values."""

    held: torch.Tensor
    made_in: Stream
    made_at: int
    used_in: Stream | None = None

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> DeviceTensor:
        wrapper = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=CUDA
        )
        wrapper.held = held
        wrapper.made_in = stream = _streams.current()
        wrapper.made_at = stream.time
        return wrapper

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Only within `simulated_cuda` is there a device to run an operator."""
        return _current.run(func, args, kwargs or {})

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"DeviceTensor({self.held})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Go into a checkpoint by value; what reads it moves it to its device."""
        _current.add_waits("to the host")
        return self.held.__reduce_ex__(protocol)

    def record_stream(self, stream: Stream) -> None:  # type: ignore[override]
        """Keep the memory until a stream has used it."""
        self.used_in = stream

    def tolist(self) -> Any:
        """Return the values: PyTorch reads them without an operator."""
        _current.add_waits("tolist")
        return self.held.tolist()


class SimulatedCuda(TorchDispatchMode):
    """Runs every operator, on the device where its tensors are there.

    Attributes:
        operators: Number of operators that reached the device, by name.
        waits: Number of times that the host would have waited for the device, by cause.
        late_waits: Number of waits for an event after which the device had been given more to do, by cause.
        inexact: Number of products that a GPU may compute in less than float32, by name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.late_waits: Counter[str] = Counter()
        self.inexact: Counter[str] = Counter()
        self.prefetched: Counter[str] = Counter()
        self.prefetch_waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run one operator on the values, as the device would; fail where tensors are on both devices."""
        name = func._schema.name
        flat, _ = tree_flatten((args, kwargs))
        on_device = [value for value in flat if isinstance(value, DeviceTensor)]
        target = kwargs.get("device")
        to_device = target is not None and torch.device(target).type == "cuda"
        to_host = target is not None and torch.device(target).type == "cpu"
        if on_device and name not in COPIES:
            self._refuse_host_tensors(name, flat)
        for value in on_device:
            _streams.current().check(value, name)
        if on_device or to_device:
            (self.prefetched if _is_prefetching() else self.operators)[name] += 1
        if on_device:
            self.add_waits(*_causes_of_waiting(name, flat, to_host, args, kwargs))
        if on_device and name in PRODUCTS and not _sums_exactly(flat):
            self.inexact[name] += 1
        held_args, held_kwargs = tree_map(_held, args), tree_map(_held, dict(kwargs))
        if to_device:
            held_kwargs["device"] = torch.device("cpu")
        held_kwargs.pop("pin_memory", None)
        result = _compute(func, name, held_args, held_kwargs)
        lands = isinstance(args[0], DeviceTensor) if name == "aten::copy_" else to_device or (on_device and not to_host)
        if not lands:
            return result
        known = {id(value.held): value for value in on_device}

        def wrap(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            return known[id(value)] if id(value) in known else DeviceTensor(value)

        return tree_map(wrap, result)

    def add_waits(self, *causes: str) -> None:
        (self.prefetch_waits if _is_prefetching() else self.waits).update(causes)

    def _refuse_host_tensors(self, name: str, flat: list[Any]) -> None:
        for value in flat:
            if not isinstance(value, torch.Tensor) or isinstance(value, DeviceTensor):
                continue
            # A scalar of the host is passed by value, but not to products.
            if (value.dim() > 0 and name not in TAKES_CPU_INDEX) or name in ("aten::mm", "aten::addmm"):
                raise RuntimeError(
                    f"Expected all tensors to be on the same device, but found cuda:0 and cpu {tuple(value.shape)} in {name}"
                )


class Stream:
    """A stream: it may use what it made itself, and what was made before an event it has waited for."""

    def __init__(self, device: object = None) -> None:
        self.time = 0
        self._seen: dict[Stream, int] = {}

    def record_event(self) -> tuple[Stream, int]:
        """Return an event after all that was made so far."""
        self.time += 1
        return self, self.time

    def wait_event(self, event: tuple[Stream, int]) -> None:
        """Use what was made before an event from now on."""
        self._seen[event[0]] = event[1]

    def wait_stream(self, other: Stream) -> None:
        """Use what another stream made so far from now on."""
        self.wait_event(other.record_event())

    def check(self, value: DeviceTensor, name: str) -> None:
        """Refuse a tensor of another stream that may not be there yet, or whose memory may be given away."""
        if value.made_in is self:
            return
        if self._seen.get(value.made_in, 0) <= value.made_at:
            raise RuntimeError(f"{name} uses a tensor of another stream without waiting for it")
        if value.made_in is not _streams.default and value.used_in is not self:
            raise RuntimeError(f"{name} uses a tensor of another stream without record_stream")


class _Streams(threading.local):
    """The current stream of each thread."""

    default = Stream()
    chosen: Stream | None = None

    def current(self) -> Stream:
        return self.chosen or self.default

    @contextmanager
    def use(self, stream: Stream) -> Iterator[None]:
        before, self.chosen = self.chosen, stream
        try:
            yield
        finally:
            self.chosen = before


class _InThread(TorchDispatchMode):
    """The device in another thread than the one that began to simulate it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _current.run(func, args, kwargs or {})


_streams = _Streams()
_current = SimulatedCuda()


@contextmanager
def simulated_cuda() -> Iterator[SimulatedCuda]:
    """Make this process's PyTorch see one CUDA device; `stub.load` must have come before PyTorch."""
    _replace_calls()
    with _current:
        yield _current


def _held(value: Any) -> Any:
    return value.held if isinstance(value, DeviceTensor) else value


def _is_prefetching() -> bool:
    return threading.current_thread().name.startswith("prefetch")


def _causes_of_waiting(name: str, flat: list[Any], to_host: bool, args: Any, kwargs: dict[str, Any]) -> list[str]:
    """Return why the host waits for an operator: one cause, or none."""
    if name in WAITING:
        return [name]
    if (to_host and not kwargs.get("non_blocking")) or (
        name == "aten::copy_" and not isinstance(args[0], DeviceTensor)
    ):
        return ["to the host"]
    if name in ("aten::index", "aten::index_put_", "aten::_index_put_impl_") and any(
        isinstance(value, DeviceTensor) and value.dtype == torch.bool for value in flat[1:]
    ):
        return ["boolean index"]
    return []


def _sums_exactly(flat: list[Any]) -> bool:
    """Tell whether the products of these factors would be added up in float32 at least, each factor as it is."""
    matmul = torch.backends.cuda.matmul
    reduced = (
        matmul.allow_tf32,
        matmul.allow_fp16_accumulation,
        # A pair of flags in some versions of PyTorch: reduction, and splitting of the sum.
        np.any(matmul.allow_fp16_reduced_precision_reduction),
        np.any(matmul.allow_bf16_reduced_precision_reduction),
    )
    factors = [value.dtype for value in flat if isinstance(value, torch.Tensor)]
    return torch.float64 in factors or not any(reduced)


def _compute(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operator on the CPU, also in the forms that only CUDA has."""
    if name == "aten::mm" and func._overloadname.startswith("dtype"):
        return (args[0].float() @ args[1].float()).to(args[2] if len(args) > 2 else kwargs["out_dtype"])
    if name in SOFTMAX and args[2]:
        return func(args[0].float(), args[1], False)
    if name in SOFTMAX_BACKWARD and args[3] == torch.float16 and args[0].dtype == torch.float32:
        return func(args[0], args[1], args[2], torch.float32).half()
    return func(*args, **kwargs)


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """Attention by products: PyTorch's fused kernels are chosen by the device."""
    assert (dropout_p, scale) == (0.0, None)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if is_causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(-1).to(value.dtype) @ value


def _replace_calls() -> None:
    """Replace what PyTorch answers or computes outside of its operators."""
    make_tensor = torch.tensor

    def tensor(data: Any, *, dtype: Any = None, device: Any = None, requires_grad: bool = False, **kwargs: Any) -> Any:
        made = make_tensor(data, dtype=dtype)
        if device is not None and torch.device(device).type == "cuda":
            _current.add_waits("from the host")
            made = made.to(device)
        return made.requires_grad_(requires_grad)

    class Event:
        recorded = 0
        waited_for = 0  # what the device had been given before the latest event that the host has waited for

        def __init__(self, enable_timing: bool = False) -> None:
            self.time = 0.0

        def record(self) -> None:
            self.recorded = _current.operators.total()
            self.time = time.perf_counter()

        def elapsed_time(self, end: Event) -> float:
            if end.recorded > Event.waited_for:
                raise RuntimeError("Both events must be completed before calculating elapsed time.")
            return 1e3 * (end.time - self.time)

        def synchronize(self) -> None:
            Event.waited_for = max(Event.waited_for, self.recorded)
            if _current.operators.total() > self.recorded:
                _current.late_waits["event"] += 1
            else:
                _current.add_waits("event")

    class Properties:
        total_memory = 80 * 2**30

    answers: dict[str, Any] = {
        "Event": Event,
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,
        "device_count": lambda: 1,
        "set_device": lambda _: None,
        "synchronize": lambda *_: _current.add_waits("synchronize"),
        "manual_seed_all": lambda _: None,
        "memory_reserved": lambda *_: 0,
        "memory_allocated": lambda *_: 0,
        "mem_get_info": lambda *_: (79 * 2**30, 80 * 2**30),
        "get_device_name": lambda *_: "NVIDIA H100 80GB HBM3",
        "get_device_properties": lambda *_: Properties,
        "Stream": Stream,
        "stream": _streams.use,
        "current_stream": lambda *_: _streams.current(),
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    run_thread = threading.Thread.run

    def run(thread: threading.Thread) -> None:
        with _InThread():
            run_thread(thread)

    threading.Thread.run = run  # type: ignore[method-assign]
    torch.Tensor.pin_memory = lambda tensor: tensor
    torch.tensor = tensor
    torch.inference_mode = torch.no_grad
    torch.nn.functional.scaled_dot_product_attention = _attention
    # Weights cast by `.to` are replaced, not filled: a wrapper's storage cannot be swapped.
    torch.__future__.set_overwrite_module_params_on_conversion(True)
