"""From a settings dataclass to click parameters: flags, environment variables and ranges."""

from __future__ import annotations

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any

import click

from clipcid_cli.commands.help_page import GroupedOption, keep_together
from clipcid_cli.steps.settings.fields import describe_range, flag_of, setting_of
from clipcid_cli.steps.settings.shared import ReadingSettings, SharedSettings

_SHARED = {field.name for field in dataclasses.fields(SharedSettings)}
_READING = {field.name for field in dataclasses.fields(ReadingSettings)}


class Number(click.ParamType[Any]):
    """A number within the range its setting declares."""

    def __init__(self, kind: type, field: dataclasses.Field[Any]) -> None:
        self.kind, self.setting = kind, setting_of(field)
        self.name = "integer" if kind is int else "number"

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """Show what kind of number is meant."""
        return "N" if self.kind is int else "X"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse and check the range; NaN is in no range."""
        try:
            # A configuration file gives numbers and truth values of its own, which must not be bent into shape.
            if isinstance(value, bool) or (self.kind is int and isinstance(value, float)):
                raise TypeError
            number = self.kind(value)
        except (TypeError, ValueError):
            self.fail(f"{value!r} is not {'a whole' if self.kind is int else 'a'} number.", param, ctx)
        low, high = self.setting.minimum, self.setting.maximum
        inside = (low is None or (number > low if self.setting.above_minimum else number >= low)) and (
            high is None or number <= high
        )
        if number != number or not inside:
            self.fail(f"{value} is out of range ({describe_range(self.setting)}).", param, ctx)
        return number


def build_parameters(command: str, settings: type[Any]) -> tuple[list[click.Parameter], list[tuple[str, str]]]:
    """Make the click parameters of a command.

    Args:
        command: Name of the command, for ``CLIPCID_<COMMAND>_<FLAG>``.
        settings: Its settings dataclass; types drive the parsing.

    Returns:
        The parameters, and (name, help) of the positional ones for the help page. What is the command's own comes before
        what it shares with others.
    """
    hints = typing.get_type_hints(settings)
    fields = sorted(dataclasses.fields(settings), key=lambda field: (field.name in _SHARED, field.name in _READING))
    parameters: list[click.Parameter] = []
    arguments: list[tuple[str, str]] = []
    for field in fields:
        setting = setting_of(field)
        kind, multiple = _parse_type(hints[field.name])
        if setting.positional:
            name = flag_of(field)
            parameters.append(
                click.Argument(
                    [field.name],
                    type=_click_type(kind, field),
                    required=False,
                    metavar=f"[{name}{'...' if multiple else ''}]",
                    nargs=-1 if multiple else 1,
                    default=None if multiple else field.default,
                )
            )
            arguments.append((name, setting.help))
        else:
            parameters.append(_make_option(command, field, kind, multiple))
    return parameters, arguments


def _make_option(command: str, field: dataclasses.Field[Any], kind: Any, multiple: bool) -> GroupedOption:
    setting = setting_of(field)
    flag = flag_of(field)
    shared = field.name in _SHARED
    stem = flag.removeprefix("--").replace("-", "_").upper()
    environment = f"CLIPCID_{stem}" if shared else f"CLIPCID_{command.replace('-', '_').upper()}_{stem}"
    text = setting.help
    shown_default = _show_default(field.default)
    extras = [part for part in (shown_default, _show_range(setting)) if part]
    if extras:
        text += "  [" + "; ".join(keep_together(extra) for extra in extras) + "]"
    if kind is bool:
        # Every switch has its opposite, since a config file or the environment may have turned it on.
        names = [f"{flag}/--no-{flag.removeprefix('--')}", field.name]
        return GroupedOption(names, group=setting.group, help=text, default=field.default, envvar=environment)
    return GroupedOption(
        [flag, field.name],
        group=setting.group,
        help=text,
        type=_click_type(kind, field),
        multiple=multiple,
        default=field.default,
        envvar=environment,
        metavar=setting.metavar,
    )


def _show_default(default: Any) -> str:
    if default is None or default == () or default is False or default is True:
        return "default: on" if default is True else ""
    if isinstance(default, tuple):
        return "default: " + " ".join(str(item) for item in default)
    return f"default: {default}"


def _show_range(setting: Any) -> str:
    return describe_range(setting) if setting.minimum is not None or setting.maximum is not None else ""


def _parse_type(hint: Any) -> tuple[Any, bool]:
    """Strip ``| None`` and ``tuple[…, ...]`` off a field's type."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        (hint,) = (part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True
    return hint, False


def _click_type(kind: Any, field: dataclasses.Field[Any]) -> click.ParamType[Any]:
    setting = setting_of(field)
    if setting.choices is not None:
        return click.Choice(list(setting.choices))
    if kind in (int, float):
        return Number(kind, field)
    if kind is Path:
        return click.Path(path_type=Path)
    return click.STRING
