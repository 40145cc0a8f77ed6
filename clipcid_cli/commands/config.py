"""The configuration file: one TOML table per command, below flags and environment, above defaults."""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Any

import click

from clipcid_cli.errors import UsageError
from clipcid_cli.formats.reading import open_regular


def load_config(ctx: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
    """Click callback of ``--config``: make the file's table for this command, ``num-clusters = 9``, its flags' defaults."""
    if path is None or ctx.resilient_parsing:
        return path
    try:
        with open_regular(path) as file:
            tables = tomllib.loads(file.read().decode("utf-8"))
    except OSError as error:
        raise UsageError(
            f"--config {path} cannot be read: {error.strerror or error}.", "Give the path of a TOML file."
        ) from error
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"--config {path} is not TOML: {error}.", "Write one table per command, e.g. [balance]."
        ) from error
    assert ctx.parent is not None
    assert isinstance(ctx.parent.command, click.Group)
    commands = ctx.parent.command.list_commands(ctx.parent)
    for name, table in tables.items():
        if name not in commands or not isinstance(table, dict):
            raise UsageError(f"{path}: [{name}] is not a command.", f"Tables are: {', '.join(commands)}.")
    ctx.default_map = _read_table(ctx, path, tables.get(ctx.command.name or "", {}))
    return path


def _read_table(ctx: click.Context, path: Path, table: dict[str, Any]) -> dict[str, Any]:
    spellings: dict[str, click.Parameter] = {}
    for parameter in ctx.command.params:
        assert parameter.name is not None
        for flag in (parameter.name, *parameter.opts):
            spellings[flag.lstrip("-").replace("-", "_")] = parameter
    values: dict[str, Any] = {}
    for key, value in table.items():
        found = spellings.get(key.replace("-", "_"))
        if found is None or found.name in (None, "config"):
            close = difflib.get_close_matches(key.replace("-", "_"), spellings, n=1)
            hint = f"Did you mean {close[0].replace('_', '-')}?" if close else "Keys are spelled like the flags."
            raise UsageError(f"{path}: [{ctx.command.name}] has an unknown key {key!r}.", hint)
        try:
            values[found.name] = _as_text(found, value)
        except TypeError as error:
            raise UsageError(
                f"{path}: [{ctx.command.name}] {key} is {value!r}, not {error}.",
                "Write it as the flag's help describes it.",
            ) from error
    return values


def _as_text(parameter: click.Parameter, value: Any) -> Any:
    """Return a value as the command line would give it, for click to convert; a TypeError says what it should be."""
    if isinstance(parameter, click.Option) and parameter.is_flag:
        if not isinstance(value, bool):
            raise TypeError("true or false")
        return value
    if parameter.multiple or parameter.nargs == -1:
        return [_item_as_text(parameter.type, item) for item in (value if isinstance(value, list) else [value])]
    return _item_as_text(parameter.type, value)


def _item_as_text(kind: click.ParamType[Any], value: Any) -> str:
    is_path, is_number = isinstance(kind, click.Path), isinstance(kind, click.IntRange | click.FloatRange)
    if isinstance(value, str) or (isinstance(value, int | float) and not isinstance(value, bool) and not is_path):
        return str(value)
    raise TypeError("a path" if is_path else "a number" if is_number else "text")
