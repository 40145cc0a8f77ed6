"""How every subcommand is made of its settings: flags and their help page, the configuration file, the run of its step."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import json
import math
import os
import re
import sys
import tomllib
import types
import typing
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from decimal import Decimal
from pathlib import Path
from typing import Any

import click
import msgspec
from click.core import ParameterSource

from clipcid_cli.errors import ClipcidError, UsageError
from clipcid_cli.formats.files import read_regular
from clipcid_cli.formats.trust import validate_work
from clipcid_cli.runtime.interruption import starts_over
from clipcid_cli.runtime.libraries import importing, let_gpu_memory_grow, set_openmp_spins
from clipcid_cli.steps.reporting import Reporter, reporting_to
from clipcid_cli.steps.settings.embed import embedding_as
from clipcid_cli.steps.settings.gpu_plan import GpuPlanSettings
from clipcid_cli.steps.settings.shared import Setting, SharedSettings, TrainingDataSettings, flag_of, setting_of

if typing.TYPE_CHECKING:
    from rich.console import Console

Show = Callable[[Any, "Console"], None]

_PREFIX = "CLIPCID_"
_GPU_PLAN = "clipcid_cli.steps.gpu_plan"
EMBED = "embed"
"""The command whose table and variables other commands take for embedding."""
# Variables that give no flag: the cache of shards, and what recipes and tests read.
_NOT_FLAGS = {f"{_PREFIX}{name}" for name in ("CACHE", "GOLDEN", "GPU_OUT", "GPU_PATIENCE", "SCALE", "VENV")}
_SHARED = {field.name for field in dataclasses.fields(SharedSettings)}
# click breaks lines at hyphens and spaces; these two stand in for those that must not be broken at until the page is done.
_HYPHEN = "\N{NON-BREAKING HYPHEN}"
_SPACE = "\N{NO-BREAK SPACE}"
_COUNT = re.compile(r"([0-9]+(?:\.[0-9]+)?)([kMG])", re.ASCII)
_FACTORS = {"k": 10**3, "M": 10**6, "G": 10**9}
_WHOLE = re.compile(r"`[^`]*`|\[default: [^]]*\]")


def step_command(name: str, settings: type[SharedSettings], *, step: str, show: Show, page: str) -> click.Command:
    """Make the click command of a step.

    `step` is a module imported only when the step runs. Its ``run(settings)`` returns the result, a
    `msgspec.Struct` whose fields are the keys of the JSON object; `show` prints it for a person.
    """
    embeds = name != EMBED and issubclass(settings, TrainingDataSettings)

    def invoke(**values: Any) -> None:
        try:
            with embedding_as(_read_embedding(click.get_current_context())) if embeds else nullcontext():
                chosen = settings(**values)
                plans = isinstance(chosen, GpuPlanSettings) and chosen.gpus is not None
                with reporting_run(chosen) as console:
                    with importing():
                        module = importlib.import_module(_GPU_PLAN if plans else step)  # a command's own constant
                    result = module.run(chosen)
                print_result(result, chosen, show_plan if plans else show, console)
        except ClipcidError as error:
            error.message += _name_sources(error.message)
            raise

    return PageCommand(name, callback=invoke, params=build_parameters(name, settings), help=page)


def show_plan(result: Any, console: Console) -> None:
    """Print what a step would take on GPUs."""
    from clipcid_cli.commands.gpu_plan import show  # and with it rich, which a help page does without

    show(result, console)


@contextmanager
def reporting_run(settings: SharedSettings) -> Iterator[Console]:
    """Prepare this process for a step, and print what the step says within the block, to the console that is given."""
    # They spin long by default; two processes that compute and decode on few cores then slow each other many times over.
    set_openmp_spins(settings.openmp_spins)
    let_gpu_memory_grow()
    from clipcid_cli.commands.console import ConsoleReporter, make_console

    console = make_console()
    is_main = os.environ.get("RANK", "0") == "0"
    reporter = ConsoleReporter(console, quiet=settings.quiet) if is_main else Reporter()
    if settings.writes_work:
        from clipcid_cli.formats.work_directory import validate_outermost  # what help pages do without

        validate_outermost(settings.work)
        if not settings.trust_work:
            validate_work(settings.work)
    # A dry run leaves nothing to continue.
    with reporting_to(reporter), starts_over() if settings.dry_run else nullcontext():
        yield console


def print_result(result: Any, settings: SharedSettings, show: Show, console: Console) -> None:
    """Print what a step returned: one JSON object on stdout with ``--json``, a summary on stderr without."""
    if os.environ.get("RANK", "0") != "0":
        return
    if settings.json:
        plain = msgspec.to_builtins(result, enc_hook=lambda number: number.item())  # NumPy's numbers
        sys.stdout.write(json.dumps(plain, allow_nan=False) + "\n")
        sys.stdout.flush()
    elif not settings.quiet:
        show(result, console)
    code = getattr(result, "exit_code", 0)  # of a result that may be bad news
    if code:
        raise click.exceptions.Exit(code)


def _read_embedding(ctx: click.Context) -> dict[str, Any]:
    """Return what the configuration file and the environment say of `embed`, for a command that embeds."""
    config = ctx.params["config"]
    if config is None and not _given_variables():
        return {}
    command = _sibling_command(ctx, EMBED)
    with command.make_context(EMBED, [] if config is None else ["--config", str(config)], parent=ctx.parent) as own:
        given = (ParameterSource.ENVIRONMENT, ParameterSource.DEFAULT_MAP)
        return {name: value for name, value in own.params.items() if own.get_parameter_source(name) in given}


def _name_sources(message: str) -> str:
    """Say of the flags that an error names, and that were not typed, which variable or file gives them; else nothing."""
    context = click.get_current_context()
    flags = re.findall(r"--[a-z][a-z-]*", message)
    sources = {
        option.opts[0]: option.get_source(context)
        for option in context.command.params
        if isinstance(option, Option) and option.opts[0] in flags
    }
    return "".join(f" ({flag} is from {source}.)" for flag, source in sources.items() if source is not None)


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
        source = None if ctx is None else self.get_source(ctx)
        if source is None or source == self.envvar:
            return source or super().get_error_hint(ctx)
        return f"{super().get_error_hint(ctx)} in {source}"

    def get_source(self, ctx: click.Context) -> str | None:
        """Return the variable or the file that the value is from; None where it was typed or is the default."""
        assert self.name is not None
        source = ctx.get_parameter_source(self.name)
        if source is ParameterSource.ENVIRONMENT:
            return str(self.envvar)
        return str(ctx.params["config"]) if source is ParameterSource.DEFAULT_MAP else None


def build_parameters(command: str, settings: type[SharedSettings]) -> list[click.Parameter]:
    """Make the click parameters of a command from its settings' types, those under one heading of the help page together."""
    hints = typing.get_type_hints(settings)

    flags = [field for field in dataclasses.fields(settings) if field.name not in settings.omitted]
    # How far from the command itself the class is that declares a field: its own headings come first.
    distances: dict[str, int] = {}
    for distance, base in enumerate(settings.__mro__):
        distances |= dict.fromkeys(inspect.get_annotations(base), distance)
    fields = sorted(flags, key=lambda field: distances[field.name])
    headings = list(dict.fromkeys(setting_of(field).group for field in fields))
    return [
        _make_parameter(command, field, *_parse_type(hints[field.name]))
        for field in sorted(flags, key=lambda field: headings.index(setting_of(field).group))
    ]


def _make_parameter(command: str, field: dataclasses.Field[Any], kind: Any, multiple: bool) -> click.Parameter:
    setting = setting_of(field)
    flag = flag_of(field)
    if setting.positional:
        default = None if multiple else field.default
        return click.Argument(
            [field.name],
            type=_click_type(kind, setting),
            help=setting.help,
            required=False,
            default=default,
            nargs=-1 if multiple else 1,
        )
    given: dict[str, Any] = {
        "group": setting.group,
        "help": setting.help,
        "default": field.default,
        "show_default": field.default is not False,
        "envvar": _variable("" if field.name in _SHARED else command, flag.removeprefix("--")),
    }
    if field.name == "config":  # before every other flag, since it sets their defaults
        given |= {"is_eager": True, "callback": load_config}
    if kind is bool:
        # Every switch has its opposite, since a config file or the environment may have turned it on.
        return Option([f"{flag}/--no-{flag.removeprefix('--')}", field.name], type=_Switch(), **given)
    metavar = setting.metavar or {int: "N", float: "X"}.get(kind)
    return Option([flag, field.name], type=_click_type(kind, setting), multiple=multiple, metavar=metavar, **given)


def _parse_type(hint: Any) -> tuple[Any, bool]:
    """Strip ``| None`` and ``tuple[…, ...]`` off a field's type."""
    if isinstance(hint, types.UnionType):
        hint = typing.get_args(hint)[0]  # before None
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True
    return hint, False


class _Path(click.Path):
    """A path, which may begin with ``~``: a shell leaves that of ``--work=~/w``, and a file of settings has no shell.

    An empty one, as a shell makes of a variable that is not set, would be the current folder.
    """

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not str(value).strip():
            self.fail("The path is empty. If a shell variable holds it, set that.", param, ctx)
        return super().convert(os.path.expanduser(value), param, ctx)


class _Switch(click.types.BoolParamType):
    """On or off; click's error also lists the empty text, as if a word was missing."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> bool:
        is_on = self.str_to_bool(value)
        if is_on is None:
            self.fail(f"{value!r} is neither true nor false (1 and 0, yes and no, on and off).", param, ctx)
        return is_on


class _FloatRange(click.FloatRange):
    """A range that asks whether a number of percent was meant as a share."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            return float(super().convert(value, param, ctx))
        except click.BadParameter as error:
            percent = math.nan
            with suppress(ValueError):
                percent = float(str(value).removesuffix("%"))
            if not (self.min == 0 and self.max == 1 and 2 <= percent <= 100):
                raise
            self.fail(f"{error.message} Did you mean {percent / 100:g}?", param, ctx)


class _CountRange(click.IntRange):
    """A range of whole numbers that may be written with a suffix, as 250k, 4M or 1.28G."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        written = _COUNT.fullmatch(str(value))
        count = value if written is None else round(Decimal(written[1]) * _FACTORS[written[2]])
        return int(super().convert(count, param, ctx))


def _click_type(kind: Any, setting: Setting) -> click.ParamType[Any]:
    if setting.choices is not None:
        return click.Choice(setting.choices)
    if kind is Path:
        return _Path(path_type=Path)
    if kind is str:
        return click.STRING
    assert setting.within is not None, "every number has a range"
    maximum = None if setting.within.maximum == float("inf") else setting.within.maximum
    kind_of_number: click.IntRange | click.FloatRange
    if kind is int:
        whole = _CountRange if setting.may_have_suffix else click.IntRange
        kind_of_number = whole(int(setting.within.minimum), None if maximum is None else int(maximum))
        kind_of_number.name = "whole number"
    else:
        kind_of_number = _FloatRange(setting.within.minimum, maximum, min_open=setting.within.min_open)
        kind_of_number.name = "number"
    return kind_of_number


def _sibling_commands(ctx: click.Context) -> dict[str, click.Command]:
    """Load all subcommands, which takes the settings of each."""
    assert ctx.parent is not None
    assert isinstance(ctx.parent.command, click.Group)
    return {name: _sibling_command(ctx, name) for name in ctx.parent.command.list_commands(ctx.parent)}


def _sibling_command(ctx: click.Context, name: str) -> click.Command:
    assert ctx.parent is not None
    assert isinstance(ctx.parent.command, click.Group)
    command = ctx.parent.command.get_command(ctx.parent, name)
    assert command is not None
    return command


def _validate_variables(ctx: click.Context) -> None:
    """Refuse a variable of the environment that begins with ``CLIPCID_`` and belongs to no flag of any subcommand."""
    given = _given_variables() - _variables(ctx.command)
    if not given:
        return
    commands = _sibling_commands(ctx)
    known = set[str]().union(*map(_variables, commands.values()))
    for name in sorted(given - known):
        # With the name of a command in it, first of all of this one.
        complete = [_variable(command, name.removeprefix(_PREFIX)) for command in (str(ctx.command.name), *commands)]
        close = [variable for variable in complete if variable in known] or difflib.get_close_matches(name, known, n=1)
        hint = f"Did you mean {close[0]}?" if close else f"Unset it, or see clipcid {ctx.command.name} --help."
        raise UsageError(f"{name} is set in the environment, but no flag reads it.", hint)


def _given_variables() -> set[str]:
    """Return the variables of the environment that are meant for flags."""
    return {name for name in os.environ if name.startswith(_PREFIX)} - _NOT_FLAGS


def _variable(command: str, flag: str) -> str:
    scope = f"{command}_" if command else ""
    return f"{_PREFIX}{scope}{flag}".replace("-", "_").upper()


def _variables(command: click.Command) -> set[str]:
    return {str(option.envvar) for option in command.params if isinstance(option, Option)}


def load_config(ctx: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
    """Click callback of ``--config``: make the file's table for this command, ``num-clusters = 9``, its flags' defaults.

    The tables of all commands are checked, so that no misspelt key goes unnoticed until its own command runs.
    """
    if path is None or ctx.resilient_parsing:
        return path
    try:
        tables = tomllib.loads(read_regular(path).decode("utf-8"))
    except OSError as error:
        raise UsageError(
            f"--config {path} cannot be read: {error.strerror or error}.", "Give the path of a TOML file."
        ) from error
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"--config {path} is not TOML: {error}.",
            "Write one table per command, e.g. [balance], texts in quotes, and switches as true or false.",
        ) from error
    commands = _sibling_commands(ctx)
    values: dict[str, dict[str, Any]] = {}
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise UsageError(
                f"{path}: {name} is outside the tables.", "Write it below the name of its command, e.g. [balance]."
            )
        if name not in commands:
            close = difflib.get_close_matches(name, commands, n=1)
            hint = f"Did you mean [{close[0]}]?" if close else f"Tables are: {', '.join(commands)}."
            raise UsageError(f"{path}: [{name}] is not a command.", hint)
        values[name] = _read_table(commands[name], path, table)
    ctx.default_map = values.get(ctx.command.name or "", {})
    return path


def _read_table(command: click.Command, path: Path, table: dict[str, Any]) -> dict[str, Any]:
    spellings: dict[str, click.Parameter] = {}
    for parameter in command.params:
        assert parameter.name is not None
        for flag in (parameter.name, *parameter.opts):
            spellings[flag.lstrip("-").replace("-", "_")] = parameter
    values: dict[str, Any] = {}
    for key, value in table.items():
        named = spellings.get(key.replace("-", "_"))
        if named is None or named.name in (None, "config"):
            close = difflib.get_close_matches(key.replace("-", "_"), spellings, n=1)
            hint = f"Did you mean {close[0].replace('_', '-')}?" if close else "Keys are spelled like the flags."
            raise UsageError(f"{path}: [{command.name}] has an unknown key {key!r}.", hint)
        try:
            values[named.name] = _as_text(named, value)
        except TypeError as error:
            raise UsageError(
                f"{path}: [{command.name}] {key} is {value!r}, not {error}.",
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
    is_path = isinstance(kind, click.Path)
    if isinstance(value, str) or (isinstance(value, int | float) and not isinstance(value, bool) and not is_path):
        return str(value)
    is_number = isinstance(kind, click.IntRange | click.FloatRange)
    raise TypeError("a path" if is_path else "a number" if is_number else "text")


class HelpPage(click.HelpFormatter):
    """click's formatter, without line breaks inside ``clip-retrieval``, ``--keep`` or ``[default: 0.9]``."""

    def write_text(self, text: str) -> None:
        super().write_text(_protect(text))

    def write_dl(self, rows: Iterable[tuple[str, str]], col_max: int = 34, col_spacing: int = 2) -> None:
        super().write_dl([(name, _protect(text)) for name, text in rows], col_max, col_spacing)

    def getvalue(self) -> str:
        return super().getvalue().replace(_HYPHEN, "-").replace(_SPACE, " ")


def _protect(text: str) -> str:
    """Forbid line breaks at hyphens, in what stands between backticks, and in defaults."""
    return _WHOLE.sub(lambda whole: whole[0].replace(" ", _SPACE), text).replace("-", _HYPHEN)


class PageContext(click.Context):
    """click's context, whose help pages are of our formatter."""

    formatter_class = HelpPage


class PageCommand(click.Command):
    """A command whose ``--help`` lists its flags under headings."""

    context_class = PageContext

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the flags that were typed, then look at those of the environment."""
        rest = super().parse_args(ctx, args)
        if not ctx.resilient_parsing:
            _validate_variables(ctx)
        return rest

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and not isinstance(parameter, click.Argument):
                groups[getattr(parameter, "group", "Other options")].append(record)
        for group, records in groups.items():
            with formatter.section(group):
                formatter.write_dl(records)
