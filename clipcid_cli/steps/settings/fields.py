"""How a setting is declared: a dataclass field that also says how it is spelled, checked and explained.

The command line, environment variables, the configuration file, the generated reference and the sidecars all read the same
field, so a default, a range or a help text is written once.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clipcid_cli.errors import UsageError

_KEY = "clipcid"
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # of which a Path keeps one slash


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers that a setting may be. NaN and infinity are in no range."""

    minimum: float
    maximum: float = math.inf
    min_open: bool = False  # whether the minimum itself is refused, as for a fraction that may not be 0

    def __contains__(self, number: float) -> bool:
        is_above = self.minimum < number if self.min_open else self.minimum <= number
        return is_above and number <= self.maximum and math.isfinite(number)

    def __str__(self) -> str:  # as click writes it
        if self.maximum == math.inf:
            return f"x{'>' if self.min_open else '>='}{self.minimum:g}"
        return f"{self.minimum:g}{'<' if self.min_open else '<='}x<={self.maximum:g}"


FRACTION = Range(0, 1)
AT_LEAST_1 = Range(1)
ABOVE_0 = Range(0, min_open=True)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is known of one field beside its name, type and default."""

    help: str
    group: str = "Options"  # heading under which ``--help`` lists it
    flag: str | None = None  # where it is not spelled as the field
    positional: bool = False
    choices: tuple[str, ...] | None = None
    within: Range | None = None  # every number has one
    metavar: str | None = None
    # Whether it leaves the outputs' content as it is (number of workers, verbosity, …): it then never makes one stale.
    operational: bool = False


def option(default: Any, help: str, **more: Any) -> Any:  # noqa: A002  # the word click and every reader use for it
    """Declare a flag, see `Setting`. The field's type says how it is parsed: ``tuple[str, ...]`` may be repeated."""
    return dataclasses.field(default=default, metadata={_KEY: Setting(help, **more)})


def group(heading: str) -> Callable[..., Any]:
    """Return `option` for the flags under one heading of the help page."""
    return functools.partial(option, group=heading)


def argument(default: Any, help: str) -> Any:  # noqa: A002
    """Declare a positional argument; one of type ``tuple[str, ...]`` takes all that are left."""
    return option(default, help, positional=True)


def setting_of(field: dataclasses.Field[Any]) -> Setting:
    """Return what was declared for a field of a settings dataclass."""
    setting = field.metadata[_KEY]
    assert isinstance(setting, Setting)
    return setting


def flag_of(field: dataclasses.Field[Any]) -> str:
    """Return the spelling of a field on the command line, e.g. ``--num-clusters`` (or ``DATA`` when positional)."""
    setting = setting_of(field)
    if setting.positional:
        return field.name.upper()
    return setting.flag or "--" + field.name.replace("_", "-")


def given_fields(settings: Any) -> list[dataclasses.Field[Any]]:
    """Return the fields that are not at their default."""
    return [field for field in dataclasses.fields(settings) if getattr(settings, field.name) != field.default]


def validate_values(settings: Any) -> None:
    """Check every number, choice and name of a settings object against what its fields declare.

    click checks the command line already, but for NaN; this also covers settings made in Python.
    """
    for field in dataclasses.fields(settings):
        setting = setting_of(field)
        flag = flag_of(field)
        value = getattr(settings, field.name)
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, Path) and any("\ud800" <= letter <= "\udfff" for letter in str(item)):
                # Linux allows any bytes, which Python keeps as lone surrogates.
                raise UsageError(
                    f"{flag} is {str(item)!a}, which is not UTF-8.",
                    "Rename the folder or file: parquet files can only be opened by names that are text.",
                )
            if isinstance(item, Path) and _URL.match(str(item)):
                url = str(item).replace(":/", "://")
                raise UsageError(
                    f"{flag} is a URL, {url}: only data is read from URLs; folders and files must be on a disk.",
                    "Give a local path, or that of a mounted bucket.",
                )
            if isinstance(item, str | Path) and "\0" in str(item):
                raise UsageError(
                    f"{flag} holds a NUL character: {str(item)!a}.", "Remove it: no name of a file has one."
                )
            if setting.choices is not None and item is not None and item not in setting.choices:
                raise UsageError(f"{flag} cannot be {item!r}.", f"Choose one of: {', '.join(setting.choices)}.")
            if setting.within is not None and item is not None and item not in setting.within:
                raise UsageError(
                    f"{flag} {item:g} is not in the range {setting.within}.", f"Give {flag} a value in that range."
                )


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
    return str(value) if isinstance(value, Path) else value
