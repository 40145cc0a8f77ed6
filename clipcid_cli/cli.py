"""The entry point: the group of subcommands, loaded one at a time, and the one place that turns errors into exit codes."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

import click

from clipcid_cli import __version__
from clipcid_cli.errors import ClipcidError

# Name → one line for `clipcid --help`, in the order of the work; each lives in commands/<name>.py and is imported only when
# it is called, so that help and usage errors answer at once.
COMMANDS = {
    "embed": "Embed images and captions with a CLIP, in clip-retrieval's layout.",
    "balance": "Remove semantic repeats: keep one image of each set of near ones.",
    "cluster": "Cluster the kept images' embeddings (spherical k-means).",
    "distill": "Train a small CLIP from the teacher's embeddings and clusters.",
    "eval-zeroshot": "Zero-shot classification and retrieval of models on data sets.",
    "eval-linear": "Linear probe: logistic regression on frozen features.",
    "export": "Write a trained model for open_clip and ONNX, checked.",
}


class LazyGroup(click.Group):
    """A group that imports a subcommand only when it is called."""

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

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the subcommands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="clipcid")
def cli() -> None:
    r"""Turn a big CLIP and a pile of image–text pairs into a small CLIP.

    The steps read and write plain files in a work directory (./clipcid-work, --work or CLIPCID_WORK), so each of these
    lines takes what the one before made:

    \b
      clipcid balance laion/ --keep 0.563
      clipcid cluster
      clipcid distill --teacher ViT-L-14 --student ViT-B-32
      clipcid eval-zeroshot
      clipcid export

    Any step runs on many GPUs or CPUs: torchrun --nproc-per-node 8 -m clipcid_cli balance …
    """


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments or os.environ.get("CLIPCID_DEBUG", "").lower() in ("1", "true", "yes", "on")
    as_json = "--json" in arguments or os.environ.get("CLIPCID_JSON", "").lower() in ("1", "true", "yes", "on")
    try:
        cli.main(args=arguments, prog_name="clipcid", standalone_mode=False)
        code = 0
    except ClipcidError as error:
        code = _tell(error, error.message, error.fix, error.exit_code, debug=debug, as_json=as_json)
    except click.UsageError as error:
        code = _tell_usage(error, as_json=as_json)
    except click.exceptions.Exit as error:
        code = error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("Interrupted; the same command continues where this one stopped.", err=True)
        code = 130
    except BrokenPipeError:
        # The reader of our pipe has gone, as `| head` does; there is nobody to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except Exception as error:
        fix = "This is a bug in clipcid, or a failure of the machine; --debug shows where it happened."
        code = _tell(error, f"{type(error).__name__}: {error}", fix, 1, debug=debug, as_json=as_json)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Threads of libraries may still end when Python takes them down, which now and then aborts a process that has done
        # its work (seen once in some hundred runs), and torchrun then calls the whole run failed.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _tell(error: Exception, message: str, fix: str, code: int, *, debug: bool, as_json: bool) -> int:
    if debug:
        traceback.print_exception(error)
    if not (isinstance(error, ClipcidError) and error.already_reported):
        click.echo(click.style("Error: ", fg="red", bold=True) + message, err=True)
        if fix:
            click.echo(fix, err=True)
        if as_json and int(os.environ.get("RANK", "0")) == 0:
            click.echo(json.dumps({"error": message, "fix": fix}))
    return code


def _tell_usage(error: click.UsageError, *, as_json: bool) -> int:
    command = error.ctx.command_path if error.ctx is not None else "clipcid"
    return _tell(error, error.format_message(), f"See {command} --help.", 2, debug=False, as_json=as_json)
