"""The screen of ``--dry-run --gpus``: what a step takes on GPUs that need not be there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from clipcid_cli.commands.summary import format_bytes, print_facts
from clipcid_cli.steps.reporting import format_duration

if TYPE_CHECKING:
    from clipcid_cli.steps.gpu_plan import GpuPlan


def show(plan: GpuPlan, console: Console) -> None:
    """Print the figures of a plan."""
    facts = {"images": f"{plan.images:,}", "time": format_duration(3600 * plan.hours)}
    if plan.host_hours is not None:
        facts["time"] += f", of which GPUs wait {format_duration(3600 * plan.host_hours)} for the host"
    elif plan.step == "balance":
        facts["time"] += " of products; the work of the host after them is not counted"
    if plan.images_per_second is not None:
        facts["time"] += f", {plan.images_per_second:,.0f} images/s"
    if plan.steps is not None and plan.seconds_per_step is not None:
        facts["steps"] = f"{plan.steps:,} of {plan.batch_size:,}, {_format_step(plan.seconds_per_step)} each"
    share = "" if plan.peak_share is None else f", {plan.peak_share:.0%} of the data sheet's rate"
    facts["products"] = f"{plan.operations:.3g} operations{share}"
    assumed = " at 25 kB an image (assumed)" if plan.step in ("embed", "distill") else ""
    facts["storage"] = f"{format_bytes(int(plan.bytes_read))} read{assumed}, {_rate(plan.read_bytes_per_second)}"
    if plan.decode_cores is not None:
        facts["decoding"] = f"{plan.decode_cores:,} cores"
    facts["disk"] = f"{format_bytes(int(plan.disk_bytes))} written"
    facts["memory"] = f"{format_bytes(int(plan.memory_bytes))} of {format_bytes(int(plan.gpu_memory_bytes))} a GPU"
    if plan.largest_batch_per_gpu is not None:
        facts["memory"] += f"; up to {plan.largest_batch_per_gpu:,} images of a batch fit"
    if plan.memory_bytes > plan.gpu_memory_bytes:
        facts["memory"] += ": too little"
    if plan.cost is not None:
        facts["cost"] = f"{plan.cost:,.2f}"
    print_facts(console, f"{plan.step} on {plan.gpus}, all of it computed (docs/gpu.md)", facts)


def _format_step(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def _rate(bytes_per_second: float) -> str:
    return f"{format_bytes(int(bytes_per_second))}/s"
