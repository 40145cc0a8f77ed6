"""The configuration file: one TOML table per command, below flags and environment, above defaults."""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Any

import click

from clipcid_cli.commands.options import Number
from clipcid_cli.errors import UsageError
from clipcid_cli.formats.reading import open_regular


def load_config(ctx: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
    """Click callback of ``--config``: make the file's table for this command the defaults of its flags.

    Keys are spelled like flags, without the dashes in front (``num-clusters`` or ``num_clusters``).

    Raises:
        UsageError: when the file cannot be read, is not TOML, or holds an unknown table or key.
    """
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
    group = ctx.parent.command
    assert isinstance(group, click.Group)
    commands = group.list_commands(ctx.parent)
    for name, table in tables.items():
        if name not in commands or not isinstance(table, dict):
            raise UsageError(f"{path}: [{name}] is not a command.", f"Tables are: {', '.join(commands)}.")
    ctx.default_map = {**(ctx.default_map or {}), **_read_table(ctx, path, tables.get(ctx.command.name or "", {}))}
    return path


def _read_table(ctx: click.Context, path: Path, table: dict[str, Any]) -> dict[str, Any]:
    spellings: dict[str, click.Parameter] = {}
    for parameter in ctx.command.params:
        assert parameter.name is not None
        spellings[parameter.name] = parameter
        for flag in parameter.opts:
            spellings[flag.lstrip("-").replace("-", "_")] = parameter
    values: dict[str, Any] = {}
    for key, value in table.items():
        found = spellings.get(key.replace("-", "_"))
        if found is None or found.name in ("config", "help"):
            close = difflib.get_close_matches(key.replace("-", "_"), spellings, n=1)
            hint = f"Did you mean {close[0].replace('_', '-')}?" if close else "Keys are spelled like the flags."
            raise UsageError(f"{path}: [{ctx.command.name}] has an unknown key {key!r}.", hint)
        assert found.name is not None
        try:
            values[found.name] = _check_type(found, value)
        except TypeError as error:
            raise UsageError(
                f"{path}: [{ctx.command.name}] {key} is {value!r}, not {error}.",
                "Write it as the flag's help describes it.",
            ) from error
    return values


def _check_type(parameter: click.Parameter, value: Any) -> Any:
    """Return a value of the file in the type that click converts for this parameter, as it does a flag's text.

    Raises:
        TypeError: with what it should be, where click would take it for something else, or fail.
    """
    if isinstance(parameter, click.Option) and parameter.is_flag:
        if not isinstance(value, bool):
            raise TypeError("true or false")
        return value
    if getattr(parameter, "multiple", False) or parameter.nargs == -1:
        return [_check_item(parameter.type, item) for item in (value if isinstance(value, list) else [value])]
    return _check_item(parameter.type, value)


def _check_item(kind: click.ParamType[Any], value: Any) -> Any:
    if isinstance(kind, Number):  # checks the type as well
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and kind is click.STRING:  # such as `shots = 4`
        return str(value)
    if not isinstance(value, str) or "\0" in value:
        raise TypeError("a path" if isinstance(kind, click.Path) else "text")
    return value
