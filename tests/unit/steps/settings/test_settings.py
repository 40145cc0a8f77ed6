"""Settings: declared once, checked, turned into flags, environment variables and config keys."""

import dataclasses
import json
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from clipcid_cli.commands.command import PageCommand, build_parameters
from clipcid_cli.errors import UsageError
from clipcid_cli.steps.settings.shared import Range, ReadingSettings, SharedSettings, argument, option, output_settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExampleSettings(SharedSettings):
    data: str | None = argument(None, "Data.")
    share: float = option(0.5, "A share.", group="Numbers", within=Range(0, 1, min_open=True))
    weight_decay: float = option(0.2, "Decay.", group="Numbers", flag="--wd", within=Range(0))
    losses: tuple[str, ...] = option((), "Losses.", flag="--loss")
    fast: bool = option(False, "Be fast.", operational=True)
    kind: str = option("a", "Kind.", choices=("a", "b"))


@pytest.fixture
def group() -> click.Group:
    def invoke(**values: object) -> None:
        settings = ExampleSettings(**values)  # type: ignore[arg-type]  # click gives what the fields declare
        click.echo(json.dumps(output_settings(settings) | {"fast": settings.fast, "quiet": settings.quiet}))

    parameters = build_parameters("example", ExampleSettings)
    command = PageCommand("example", callback=invoke, params=parameters, help="Show what is set.")
    return click.Group("clipcid", commands=[command])


def call(group: click.Group, *arguments: str, env: dict[str, str] | None = None) -> dict[str, object]:
    result = CliRunner().invoke(group, ["example", *arguments], env=env, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.output))


def test_operational_settings_do_not_decide_the_output(group: click.Group) -> None:
    assert not {"work", "workers", "fast"} & output_settings(ExampleSettings()).keys()
    assert "seed" in output_settings(ExampleSettings())


def test_precedence_is_flag_environment_file_default(group: click.Group, tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text("[example]\nshare = 0.1\nwd = 0.3\nquiet = true\n")
    assert call(group)["share"] == 0.5
    from_file = call(group, "--config", str(config))
    assert (from_file["share"], from_file["weight_decay"], from_file["quiet"]) == (0.1, 0.3, True)
    environment = {"CLIPCID_EXAMPLE_SHARE": "0.2", "CLIPCID_QUIET": "false"}
    over_file = call(group, "--config", str(config), env=environment)
    assert (over_file["share"], over_file["quiet"]) == (0.2, False)
    assert call(group, "--config", str(config), "--share", "0.9", env=environment)["share"] == 0.9


def test_a_misspelt_key_of_another_command_is_an_error(group: click.Group, tmp_path: Path) -> None:
    group.add_command(PageCommand("other", params=build_parameters("other", ExampleSettings)))
    config = tmp_path / "c.toml"
    config.write_text("[example]\nshare = 0.1\n[other]\nshaer = 0.2\n")
    with pytest.raises(UsageError, match=r"\[other\] has an unknown key 'shaer'") as raised:
        call(group, "--config", str(config))
    assert raised.value.fix == "Did you mean share?"


def test_a_bad_value_of_the_environment_is_told_by_its_variable(group: click.Group) -> None:
    result = CliRunner().invoke(group, ["example"], env={"CLIPCID_EXAMPLE_SHARE": "half"})
    assert "Invalid value for CLIPCID_EXAMPLE_SHARE: 'half' is not a valid number" in result.output


def test_an_empty_path_is_not_the_current_folder(group: click.Group) -> None:
    for empty in ("", " "):
        result = CliRunner().invoke(group, ["example", "--work", empty])
        assert "Invalid value for '--work': The path is empty. If a shell variable holds it" in result.output
    with pytest.raises(UsageError, match="--loss is empty"):
        call(group, "--loss", "")


def test_values_given_in_python_are_checked_too() -> None:
    for number in (2.0, float("nan")):  # and NaN alone of the command line, since click finds it in every range
        with pytest.raises(UsageError, match=f"--share {number:g} is not in the range 0<x<=1"):
            ExampleSettings(share=number)
    with pytest.raises(UsageError, match="--kind cannot be 'z'"):
        ExampleSettings(kind="z")
    with pytest.raises(UsageError, match=r"--work holds a NUL character: 'a\\x00b'"):  # as a file of settings can say
        ExampleSettings(work=Path("a\0b"))
    with pytest.raises(UsageError, match="--work is a URL, s3://bucket/w: only data is read from URLs"):
        ExampleSettings(work=Path("s3://bucket/w"))
    with pytest.raises(UsageError, match="--caption-column and --caption-key both say where"):
        ReadingSettings(caption_column="text", caption_key=("txt",))
