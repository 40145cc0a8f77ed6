"""How every subcommand is made: parse the settings, run the step, print the result."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import click
import msgspec
from rich.console import Console

from clipcid_cli.commands.help_page import PageCommand
from clipcid_cli.commands.options import build_parameters
from clipcid_cli.runtime.libraries import importing
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.shared import SharedSettings

Show = Callable[[Any, "Console"], None]


def step_command(name: str, settings: type[SharedSettings], *, step: str, show: Show, page: str) -> click.Command:
    """Make the click command of a step.

    Args:
        step: Module imported only when the step runs. Its ``run(settings, reporter)`` returns the result, a
            `msgspec.Struct` whose fields are the keys of the JSON object.
        show: Prints the result for a person.
        page: What the help page says before the flags, with examples.
    """

    def invoke(**values: Any) -> None:
        run_step(settings(**values), step, show)

    return PageCommand(name, callback=invoke, params=build_parameters(name, settings), help=page)


def run_step(settings: SharedSettings, step: str, show: Show) -> None:
    """Run a step and print its result: one JSON object on stdout with ``--json``, a summary on stderr without."""
    # OpenMP's idle threads spin by default; two processes that compute and decode on few cores then slow each other
    # many times over. It must be set before torch loads.
    os.environ.setdefault("GOMP_SPINCOUNT", settings.openmp_spins)
    from clipcid_cli.commands.console import ConsoleReporter, make_console

    console = make_console()
    is_main = os.environ.get("RANK", "0") == "0"
    reporter = ConsoleReporter(console, quiet=settings.quiet) if is_main else Reporter()
    with importing():
        module = importlib.import_module(step)
    result = module.run(settings, reporter)
    if not is_main:
        return
    if settings.json:
        plain = msgspec.to_builtins(result, enc_hook=lambda number: number.item())  # NumPy's numbers
        sys.stdout.write(json.dumps(plain, allow_nan=False) + "\n")
        sys.stdout.flush()
    elif not settings.quiet:
        show(result, console)
