"""From a settings dataclass to click parameters: flags, environment variables, types and ranges."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from clipcid_cli.commands.config import load_config
from clipcid_cli.steps.settings.fields import Setting, flag_of, setting_of
from clipcid_cli.steps.settings.shared import SharedSettings

_SHARED = {field.name for field in dataclasses.fields(SharedSettings)}


class Option(click.Option):
    """A flag that knows its heading on the help page."""

    def __init__(self, *args: Any, group: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group = group

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Return the spelling and the explanation; of a switch that is off by default, only how to turn it on."""
        record = super().get_help_record(ctx)
        if record is None or not self.secondary_opts or self.default is True:
            return record
        return self.opts[0], record[1]

    def get_error_hint(self, ctx: click.Context | None) -> str:
        """Name the flag, or the variable or file that its value is from."""
        source = None if ctx is None or self.name is None else ctx.get_parameter_source(self.name)
        if source is ParameterSource.ENVIRONMENT:
            return str(self.envvar)
        hint = super().get_error_hint(ctx)
        return f"{hint} in {ctx.params['config']}" if ctx and source is ParameterSource.DEFAULT_MAP else hint


def build_parameters(command: str, settings: type[SharedSettings]) -> list[click.Parameter]:
    """Make the click parameters of a command from its settings' types, those under one heading of the help page together."""
    hints = typing.get_type_hints(settings)

    def distance(field: dataclasses.Field[Any]) -> int:
        """How far from the command itself the class is that declares a field: its own headings come first."""
        return max(far for far, base in enumerate(settings.__mro__) if field.name in inspect.get_annotations(base))

    fields = sorted(dataclasses.fields(settings), key=distance)
    headings = list(dict.fromkeys(setting_of(field).group for field in fields))
    return [
        _make_parameter(command, field, *_parse_type(hints[field.name]))
        for field in sorted(dataclasses.fields(settings), key=lambda field: headings.index(setting_of(field).group))
    ]


def _make_parameter(command: str, field: dataclasses.Field[Any], kind: Any, multiple: bool) -> click.Parameter:
    setting, flag = setting_of(field), flag_of(field)
    if setting.positional:
        default = None if multiple else field.default
        return click.Argument(
            [field.name], help=setting.help, required=False, default=default, nargs=-1 if multiple else 1
        )
    scope = "" if field.name in _SHARED else f"{command}_"
    given: dict[str, Any] = {
        "group": setting.group,
        "help": setting.help,
        "default": field.default,
        "show_default": field.default is not False,
        "envvar": f"CLIPCID_{scope}{flag.removeprefix('--')}".replace("-", "_").upper(),
    }
    if field.name == "config":  # before every other flag, since it sets their defaults
        given |= {"is_eager": True, "callback": load_config}
    if kind is bool:
        # Every switch has its opposite, since a config file or the environment may have turned it on.
        return Option([f"{flag}/--no-{flag.removeprefix('--')}", field.name], **given)
    metavar = setting.metavar or {int: "N", float: "X"}.get(kind)
    return Option([flag, field.name], type=_click_type(kind, setting), multiple=multiple, metavar=metavar, **given)


def _parse_type(hint: Any) -> tuple[Any, bool]:
    """Strip ``| None`` and ``tuple[…, ...]`` off a field's type."""
    if isinstance(hint, types.UnionType):
        (hint,) = (part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True
    return hint, False


def _click_type(kind: Any, setting: Setting) -> click.ParamType[Any]:
    if setting.choices is not None:
        return click.Choice(setting.choices)
    if kind is Path:
        return click.Path(path_type=Path)
    if kind is str:
        return click.STRING
    assert setting.within is not None, "every number has a range"
    maximum = None if setting.within.maximum == float("inf") else setting.within.maximum
    number: click.IntRange | click.FloatRange
    if kind is int:
        number = click.IntRange(int(setting.within.minimum), None if maximum is None else int(maximum))
        number.name = "whole number"
    else:
        number = click.FloatRange(setting.within.minimum, maximum, min_open=setting.within.min_open)
        number.name = "number"
    return number
