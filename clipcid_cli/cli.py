"""The entry point: the group of subcommands, loaded one at a time, and the one place that turns errors into exit codes."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from typing import NoReturn

import click

from clipcid_cli import __version__
from clipcid_cli.commands.failures import explain, read_world
from clipcid_cli.commands.help_page import PageContext
from clipcid_cli.commands.signals import UNREAD, Signals, drop, drop_unread, open_closed
from clipcid_cli.commands.wrapping import wrap
from clipcid_cli.errors import ClipcidError

# Name → one line for `clipcid --help`, in the order of the work; each lives in commands/<name>.py and is imported only when
# it is called, so that help and usage errors answer at once.
COMMANDS = {
    "embed": "Embed images and captions with a CLIP.",
    "balance": "Remove near-duplicates: keep one image of each group.",
    "cluster": "Cluster the embeddings of the kept images (k-means).",
    "distill": "Train a small CLIP on a teacher's embeddings.",
    "eval-zeroshot": "Measure zero-shot classification and retrieval.",
    "eval-linear": "Measure a linear probe on frozen image features.",
    "export": "Export a model to open_clip, Hugging Face or ONNX.",
}


class LazyGroup(click.Group):
    """A group that imports a subcommand only when it is called."""

    context_class = PageContext

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the subcommands in the order of the work."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return one subcommand."""
        if cmd_name not in COMMANDS:
            return None
        command = import_module(f"clipcid_cli.commands.{cmd_name.replace('-', '_')}").command
        assert isinstance(command, click.Command)
        return command

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
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments or os.environ.get("CLIPCID_DEBUG", "").lower() in ("1", "true", "yes", "on")
    as_json = "--json" in arguments or os.environ.get("CLIPCID_JSON", "").lower() in ("1", "true", "yes", "on")
    command = next((word for word in arguments if word in COMMANDS), "")
    signals, rank, size, code = Signals(), 0, 1, 1
    try:
        rank, size = read_world()
        signals.watch(lambda: _report_interrupt(rank))
        # click's own `main` makes exit 1 of every broken pipe; it is for shells that ask for completions.
        if os.environ.get("_CLIPCID_COMPLETE"):
            cli.main(args=arguments, prog_name="clipcid", standalone_mode=False)
        with cli.make_context("clipcid", arguments) as context:
            cli.invoke(context)
        sys.stdout.flush()
        code = 0
    except ClipcidError as error:
        if signals.received is None:
            code = _report(error, error.message, error.fix, error.exit_code, debug=debug, as_json=as_json)
        else:  # as below
            _report_interrupt(rank)
    except click.exceptions.NoArgsIsHelpError as error:
        _say(error.format_message())
        code = 2
    except click.UsageError as error:
        code = _report_usage(error, as_json=as_json)
    except click.exceptions.Exit as error:
        code = error.exit_code
    except BrokenPipeError as error:
        code = UNREAD  # as with `| head`: nobody is left to read an error
        if not drop_unread():  # another pipe, to a process that has died
            code = _report_unforeseen(error, command, (rank, size), debug=debug, as_json=as_json)
    except (KeyboardInterrupt, click.Abort):
        _report_interrupt(rank)
        code = signals.exit_code
    except Exception as error:
        if signals.received is None:
            code = _report_unforeseen(error, command, (rank, size), debug=debug, as_json=as_json)
        else:  # a library turned the interrupt into an error of its own
            _report_interrupt(rank)
    if signals.received is not None:  # whatever it made fail first
        code = signals.exit_code
    drop_unread()  # what is left in a buffer would fail again when Python ends
    signals.stop()
    if size > 1:
        # Library threads may still be ending while Python shuts down. About once in a hundred runs that aborts a process
        # whose work is done, and torchrun then reports the whole run as failed.
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _report_unforeseen(error: Exception, command: str, place: tuple[int, int], *, debug: bool, as_json: bool) -> int:
    if isinstance(error, OSError) and error.filename is None:
        # Perhaps stdout's own, as of `> /dev/full`; what is left in its buffer would fail again when Python ends.
        try:
            sys.stdout.flush()
        except OSError:
            drop(sys.stdout)
    found, (rank, size) = explain(error, command), place
    # Nobody foresaw it, so no other process has it.
    message = found.message if size == 1 else f"Process {rank}: {found.message}"
    return _report(error, message, found.fix, 1, debug=debug, as_json=as_json)


def _report_interrupt(rank: int) -> None:
    if rank == 0:
        _say("Interrupted. Run the same command again to continue where it stopped.")


def _say(text: str) -> None:
    """Write to stderr, where that can be written to."""
    with suppress(OSError):
        click.echo(text, err=True)


def _report(error: Exception, message: str, fix: str, code: int, *, debug: bool, as_json: bool) -> int:
    if debug:
        traceback.print_exception(error)
    if not (isinstance(error, ClipcidError) and error.already_reported):
        head, _, rest = _fit(f"Error: {message}").partition(" ")
        _say((head if "NO_COLOR" in os.environ else click.style(head, fg="red", bold=True)) + f" {rest}")
        if fix:
            _say(_fit(fix))
        if as_json and os.environ.get("RANK", "0") == "0":
            with suppress(OSError):
                click.echo(json.dumps({"error": message, "fix": fix}))
    return code


def _report_usage(error: click.UsageError, *, as_json: bool) -> int:
    command = error.ctx.command_path if error.ctx is not None else "clipcid"
    message, fix = error.format_message(), f"See {command} --help."
    extra = re.fullmatch(r"Got unexpected extra arguments? \((.*)\)", message)
    params = [] if error.ctx is None else error.ctx.command.params
    if extra is not None and any(isinstance(each, click.Argument) and each.name == "data" for each in params):
        names = extra[1].split()
        if all(map(os.path.exists, names)):
            more = "1 more argument" if len(names) == 1 else f"{len(names):,} more arguments"
            message = f"Got {more} than DATA, such as {names[0]}: did the shell expand a pattern?"
            fix = f"Quote the pattern, as in 'laion/{{00000..00099}}.tar', or name the folder. {fix}"
    return _report(error, message, fix, 2, debug=False, as_json=as_json)


def _fit(text: str) -> str:
    """Break a text into lines for the terminal; a log file gets it whole, so that it can be searched."""
    return wrap(text, shutil.get_terminal_size().columns) if sys.stderr.isatty() else text
