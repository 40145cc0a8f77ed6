"""`clipcid doctor`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from clipcid_cli.commands.command import step_command
from clipcid_cli.commands.summary import count, format_bytes, print_facts, print_table
from clipcid_cli.steps.settings.doctor import DoctorSettings

if TYPE_CHECKING:
    from clipcid_cli.steps.doctor.needs import Check
    from clipcid_cli.steps.doctor.run import DoctorResult


def show(result: DoctorResult, console: Console) -> None:
    """Print a line for each figure beside its needs, then what to change, and where the needs come from."""
    where = f"{count(result.processes, 'process', 'processes')} on {count(result.hosts, 'host')}"
    models = list(result.images_per_second)
    columns = ["", "here", *(f"{name} (c)" for name in models), ""]
    rows = [
        [check.name, _format_figure(check), *(_format_need(check, name) for name in models), check.verdict]
        for check in result.checks
    ]
    print_table(console, f"This machine, {where}", columns, rows)
    console.print()
    rates = ", ".join(f"{name} {_shorten(rate)}" for name, rate in result.images_per_second.items())
    facts = {
        check.name: ". ".join(filter(None, (check.problem, check.advice)))
        for check in result.checks
        if check.problem or check.advice
    }
    facts |= {
        "(c)": f"computed: what {result.device} needs, which trains on so many images/s: {rates}",
        "versions": ", ".join(f"{name} {version}" for name, version in result.versions.items()),
    }
    print_facts(console, "", facts)


def _format_figure(check: Check) -> str:
    if check.figure is None:
        return "no" if check.problem else "yes"
    return _format(check.figure, check.unit)


def _format_need(check: Check, model: str) -> str:
    if model not in check.needs:
        return ""
    return f"{'≤' if check.unit == 's' else '≥'} {_format(check.needs[model], check.unit)}"


def _format(value: float, unit: str) -> str:
    if unit == "s":
        return f"{_shorten(value)} s" if value >= 1 else f"{_shorten(1e3 * value)} ms"
    if unit in ("B", "B/s"):
        return format_bytes(int(value)) + unit.removeprefix("B")
    if unit == "FLOP/s":
        return f"{_shorten(value / 1e12)} TFLOP/s"
    return _shorten(value) + ("" if unit in ("cores", "files") else "/s")


def _shorten(value: float) -> str:
    """Write three digits of a number."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


command = step_command(
    "doctor",
    DoctorSettings,
    step="clipcid_cli.steps.doctor.run",
    show=show,
    page="""
Measure what this machine gives to a run, and compare it with what training a ViT-B-32 and a ViT-B-16 needs: cores and
memory, shared memory, open files, locks, the disks of the data and of the work directory, decoding, copies to a GPU,
the sum of gradients, versions. Takes about 15 seconds and leaves no file behind. The exit code is 1 where a run would
end with an error, or wait most of the time.

\b
Examples:
  clipcid doctor --data laion/
  clipcid doctor --data laion/ --gpus 8xH100 --json
  torchrun --nproc-per-node 8 -m clipcid_cli doctor --data laion/
""",
)
