"""How a setting is declared: a dataclass field that also says how it is spelled, checked and explained.

The command line, the environment variables, the configuration file, the generated reference and the sidecars all read the
same field, so a default or a help text is written once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clipcid_cli.errors import UsageError

_KEY = "clipcid"


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is known of one field beside its name, type and default.

    Attributes:
        help: One or two sentences for the user.
        group: Heading under which ``--help`` lists it.
        flag: Spelling of the flag where it is not the field's name, e.g. ``--wd``.
        positional: Whether it is a positional argument rather than a flag.
        choices: Allowed words, where only some are.
        minimum: Smallest allowed number (itself allowed unless ``above_minimum``).
        maximum: Largest allowed number, itself allowed.
        above_minimum: Whether the minimum itself is refused, as for a share that may not be 0.
        metavar: Placeholder in the help text.
        operational: Whether it leaves the outputs' content as it is (number of workers, verbosity, …); such settings are
            recorded in sidecars but never make an output stale.
    """

    help: str
    group: str = "Options"
    flag: str | None = None
    positional: bool = False
    choices: tuple[str, ...] | None = None
    minimum: float | None = None
    maximum: float | None = None
    above_minimum: bool = False
    metavar: str | None = None
    operational: bool = False


def option(
    default: Any,
    help: str,  # noqa: A002  # the word click and every reader use for it
    *,
    group: str = "Options",
    flag: str | None = None,
    choices: Sequence[str] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    above_minimum: bool = False,
    metavar: str | None = None,
    operational: bool = False,
) -> Any:
    """Declare a flag. The field's type says how it is parsed: ``tuple[str, ...]`` may be given several times."""
    setting = Setting(
        help=help,
        group=group,
        flag=flag,
        choices=tuple(choices) if choices is not None else None,
        minimum=minimum,
        maximum=maximum,
        above_minimum=above_minimum,
        metavar=metavar,
        operational=operational,
    )
    return dataclasses.field(default=default, metadata={_KEY: setting})


def argument(default: Any, help: str, *, metavar: str | None = None) -> Any:  # noqa: A002  # as above
    """Declare a positional argument; a ``tuple[str, ...]`` field takes all that are left."""
    setting = Setting(help=help, group="Arguments", positional=True, metavar=metavar)
    return dataclasses.field(default=default, metadata={_KEY: setting})


def setting_of(field: dataclasses.Field[Any]) -> Setting:
    """Return what was declared for a field of a settings dataclass."""
    setting = field.metadata[_KEY]
    assert isinstance(setting, Setting)
    return setting


def flag_of(field: dataclasses.Field[Any]) -> str:
    """Return the spelling of a field on the command line, e.g. ``--num-clusters`` (or ``DATA`` when positional)."""
    setting = setting_of(field)
    if setting.positional:
        return setting.metavar or field.name.upper()
    return setting.flag or "--" + field.name.replace("_", "-")


def check_ranges(settings: Any) -> None:
    """Check every number and choice of a settings object against what its fields declare.

    click checks the command line already; this also covers settings made in Python, so that a step never runs on
    values its flags would refuse.

    Raises:
        UsageError: naming the flag, the value and the allowed range.
    """
    for field in dataclasses.fields(settings):
        setting, value = setting_of(field), getattr(settings, field.name)
        for item in value if isinstance(value, tuple) else (value,):
            if item is None or isinstance(item, bool):
                continue
            if isinstance(item, Path) and not _is_utf8(item):
                raise UsageError(
                    f"{flag_of(field)} is {str(item)!a}, which is not UTF-8.",
                    "Rename the folder or file: parquet files can only be opened by names that are text.",
                )
            if isinstance(item, str | Path) and "\0" in str(item):
                raise UsageError(
                    f"{flag_of(field)} holds a NUL character: {str(item)!a}.", "Remove it: no name of a file has one."
                )
            if setting.choices is not None and item not in setting.choices:
                raise UsageError(
                    f"{flag_of(field)} cannot be {item!r}.", f"Choose one of: {', '.join(setting.choices)}."
                )
            if isinstance(item, int | float):
                _check_number(flag_of(field), item, setting)


def _is_utf8(path: Path) -> bool:
    """Tell whether a path is text: Linux allows any bytes, which Python keeps as lone surrogates."""
    return not any("\ud800" <= letter <= "\udfff" for letter in str(path))


def _check_number(flag: str, value: float, setting: Setting) -> None:
    low, high = setting.minimum, setting.maximum
    too_low = low is not None and (value <= low if setting.above_minimum else value < low)
    too_high = high is not None and value > high
    if too_low or too_high or value != value:
        raise UsageError(
            f"{flag} {value:g} is out of range ({describe_range(setting)}).", f"Give {flag} a value in that range."
        )


def describe_range(setting: Setting) -> str:
    """Write the allowed range in a few words: ``0 to 2``, ``0 < x ≤ 1``, ``at least 1``."""
    low, high = setting.minimum, setting.maximum
    if low is not None and high is not None:
        return f"{low:g} < x ≤ {high:g}" if setting.above_minimum else f"{low:g} to {high:g}"
    if low is not None:
        return f"{'above' if setting.above_minimum else 'at least'} {low:g}"
    return f"at most {high:g}"


def output_settings(settings: Any) -> dict[str, Any]:
    """Return the settings that decide what a step writes, as plain JSON values, for its sidecar."""
    return {
        field.name: plain(getattr(settings, field.name))
        for field in dataclasses.fields(settings)
        if not setting_of(field).operational
    }


def plain(value: Any) -> Any:
    """Turn paths and tuples into what JSON knows."""
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)
