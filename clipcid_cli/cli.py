"""The entry point: the group of subcommands, loaded one at a time, and the one place that turns errors into exit codes."""

from __future__ import annotations

import difflib
import json
import os
import shutil
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from typing import NoReturn

import click

from clipcid_cli import __version__, typed
from clipcid_cli.commands.command import PageContext
from clipcid_cli.commands.failures import explain, validate_world
from clipcid_cli.commands.signals import end_on_signals, leave_end_to_signal, open_closed
from clipcid_cli.shown import plain

# Name → one line for `clipcid --help`, in the order of the work; each lives in commands/<name>.py and is imported only when
# it is called, so that help and usage errors answer at once.
COMMANDS = {
    "embed": "Embed images and captions with a CLIP.",
    "balance": "Remove near-duplicates: keep one image of each set.",
    "cluster": "Cluster the embeddings of the kept images (k-means).",
    "distill": "Train a small CLIP on a teacher's embeddings.",
    "eval-zeroshot": "Measure zero-shot classification and retrieval.",
    "eval-linear": "Measure a linear probe on frozen image features.",
    "export": "Export a model to open_clip, Hugging Face or ONNX.",
    "runs": "List what a work directory holds, as a table and a page.",
    "verify": "Check that files are as they were written.",
    "doctor": "Compare this machine with what a run needs.",
}


class LazyGroup(click.Group):
    """A group that imports a subcommand only when it is called."""

    context_class = PageContext

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the subcommands in the order of the work."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        # One of `COMMANDS`, whatever was typed.
        command = import_module(f"clipcid_cli.commands.{cmd_name.replace('-', '_')}").command
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the subcommand that is called, or suggest one that is spelled alike."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            close = difflib.get_close_matches(args[0], COMMANDS, n=1)
            if not close:
                raise
            raise click.UsageError(f"{error.message} Did you mean {close[0]}?", ctx) from error

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the subcommands without importing them, then the group's own options."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))
        click.Command.format_options(self, ctx, formatter)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="clipcid", help="Show the version and exit.")
def cli() -> None:
    """Turn a big CLIP and a collection of image-text pairs into a small CLIP.

    Each step reads and writes plain files in a work directory (--work, CLIPCID_WORK or ./clipcid-work). A step that is
    not given its inputs takes what the previous one left there, so the commands below run one after another as they are.

    Every step also runs on many GPUs, CPUs and hosts under torchrun, as in the last example.

    \b
    Examples:
      clipcid balance laion/ --keep 0.563
      clipcid distill --teacher ViT-L-14 --student ViT-B-32
      clipcid eval-zeroshot
      clipcid eval-linear --train food101/train --test food101/test
      clipcid export
      torchrun --nproc-per-node 8 -m clipcid_cli balance laion/ --keep 0.563
    """  # noqa: D301  # a backspace keeps the lines of a paragraph


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 done, 1 failed, 2 wrong usage, 130 interrupted, 141 not read, 143 terminated."""
    open_closed()
    end_on_signals()
    code = run(sys.argv[1:] if arguments is None else arguments)
    leave_end_to_signal()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    # All is written. Python's own end would free every object first, and now and then abort where the threads of a library
    # are still ending, which torchrun reports as a failed run.
    os._exit(code)


def run(arguments: Sequence[str]) -> int:
    """Run a command line, tell what went wrong, and return the exit code."""
    debug, as_json = (
        f"--{flag}" in arguments or os.environ.get(f"CLIPCID_{flag.upper()}", "").lower() in ("1", "true", "yes", "on")
        for flag in ("debug", "json")
    )
    typed.remember(arguments)
    try:
        validate_world()
        # click's own `main` makes exit 1 of every broken pipe; it is for shells that ask for completions.
        if os.environ.get("_CLIPCID_COMPLETE"):
            cli.main(args=list(arguments), prog_name="clipcid", standalone_mode=False)
        with cli.make_context("clipcid", list(arguments)) as context:
            cli.invoke(context)
        sys.stdout.flush()
    except click.exceptions.Exit as end:
        return end.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        _say(error.format_message())
        return 2
    except Exception as error:
        if debug and not isinstance(error, click.UsageError):
            click.echo(plain("".join(traceback.format_exception(error))), err=True, nl=False)
        failure = explain(error, next((word for word in arguments if word in COMMANDS), ""))
        if failure.message:
            _say(failure.message, head="Error:")
            if failure.fix:
                _say(failure.fix)
            if as_json and os.environ.get("RANK", "0") == "0":
                with suppress(OSError):
                    click.echo(json.dumps({"error": failure.message, "fix": failure.fix}))
        return failure.code
    return 0


def _say(text: str, head: str = "") -> None:
    """Write to stderr, if it can be written to: in lines that fit a terminal, but whole to a log file, to be searched."""
    text = plain(f"{head} {text}" if head else text)
    if sys.stderr.isatty():
        from clipcid_cli.commands.summary import wrap  # and with it rich, which a help page does without

        text = wrap(text, shutil.get_terminal_size().columns)
    if head and "NO_COLOR" not in os.environ:
        text = click.style(head, fg="red", bold=True) + text.removeprefix(head)
    with suppress(OSError):
        click.echo(text, err=True)
