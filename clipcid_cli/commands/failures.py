"""What went wrong: what the user is told of an error, and the exit code; memory, disks and files are told from bugs.

Nothing here imports PyTorch: its errors are recognised by their names and words.
"""

from __future__ import annotations

import errno
import os
import re
import shlex
import sys
from typing import NamedTuple

import click

from clipcid_cli.commands.signals import UNREAD, is_unread
from clipcid_cli.errors import ClipcidError, UsageError, in_one_line
from clipcid_cli.typed import this_command

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "Cannot allocate memory")
# What PyTorch says of a file in /dev/shm, which ends in the number of the system's error.
_SHARED_MEMORY = re.compile(r"<?/torch_\w+>?.*: (?P<why>[^:]+) \((?P<code>\d+)\)")
_OF_GPU = ("CUDA", "CUBLAS", "HIP ")
# What each command can be told so that it takes less memory, on a GPU or not.
_LESS_MEMORY = {
    "embed": "a smaller --batch-size",
    "balance": "fewer processes on this machine, or clipcid embed DATA with a smaller --batch-size before it; --dry-run "
    "estimates the memory of the search",
    "cluster": "fewer --num-clusters, or --train-rows",
    "distill": "--grad-checkpointing, a larger --accum-freq or a smaller --batch-size",
    "eval-zeroshot": "a smaller --batch-size",
    "eval-linear": "a smaller --batch-size",
    "export": "fewer --check-images",
}
_WITH_WORKERS = ("embed", "distill", "eval-zeroshot", "eval-linear")
_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


class Failure(NamedTuple):
    """What is said of an error; nothing where the message is empty."""

    message: str
    fix: str
    code: int


def explain(error: Exception, command: str = "") -> Failure:
    """Say what an error means, for the user of a subcommand, whose flags a fix may name."""
    if isinstance(error, ClipcidError):
        # Another process of the run says it.
        return Failure("" if error.already_reported else error.message, error.fix, error.exit_code)
    if isinstance(error, click.UsageError):
        return _explain_usage(error)
    if isinstance(error, BrokenPipeError) and any(map(is_unread, (sys.stdout, sys.stderr))):
        return Failure("", "", UNREAD)  # as with `| head`: nobody is left to read an error
    text = in_one_line(error) or type(error).__name__
    if isinstance(error, MemoryError) or any(words in text for words in _NO_MEMORY):
        message, fix = _explain_memory(text, command)
    elif isinstance(error, OSError):
        message, fix = _explain_system(error, text)
    elif shared := _SHARED_MEMORY.search(text):
        message, fix = _explain_shared_memory(shared["why"], int(shared["code"]))
    else:
        message = f"{type(error).__name__}: {text}"
        fix = "This is a bug in clipcid or a failure of the machine. Add --debug to see where it happened."
    if os.environ.get("WORLD_SIZE", "1") != "1":
        # Nobody foresaw it, so no other process has it.
        message = f"Process {os.environ.get('RANK', '0')}: {message}"
    return Failure(message, fix, 1)


def _explain_usage(error: click.UsageError) -> Failure:
    command = error.ctx.command_path if error.ctx is not None else "clipcid"
    message = error.format_message()
    fix = f"See {command} --help."
    if isinstance(error, click.NoSuchOption):
        files = (word for word in this_command() if word.startswith(error.option_name) and os.path.lexists(word))
        file = next(files, None)
        if file is not None:
            return Failure(message, f"If the file {file} is meant, write {shlex.quote(f'./{file}')}.", error.exit_code)
        if error.option_name == "--device":
            return Failure(
                f"No such option {error.option_name!r}.", f"This command runs on the CPU. {fix}", error.exit_code
            )
    extra = re.fullmatch(r"Got unexpected extra arguments? \((.*)\)", message)
    params = [] if error.ctx is None else error.ctx.command.params
    if extra is not None and any(
        isinstance(parameter, click.Argument) and parameter.name == "data" for parameter in params
    ):
        names = extra[1].split()
        if all(map(os.path.exists, names)):
            more = "1 more argument" if len(names) == 1 else f"{len(names):,} more arguments"
            message = f"Got {more} than DATA, such as {names[0]}: did the shell expand a pattern?"
            fix = f"Quote the pattern, as in 'laion/{{00000..00099}}.tar', or name the folder. {fix}"
        elif "--" in this_command() and any(name.startswith("-") for name in names):
            fix = f"What stands after -- is read as names, not as flags: write flags before it. {fix}"
    return Failure(message, fix, error.exit_code)


def _explain_memory(text: str, command: str) -> tuple[str, str]:
    on_gpu = any(words in text for words in _OF_GPU)
    what = "The memory of the GPU ran out" if on_gpu else "Memory ran out"
    less = _LESS_MEMORY.get(command, "a smaller --batch-size")
    if not on_gpu and command in _WITH_WORKERS:
        less += " or fewer --workers"
    context = "a GPU with more memory" if on_gpu else "a machine with more memory"
    return f"{what}: {text.rstrip('.')}.", f"Use {less}; or use {context}."


def _explain_shared_memory(why: str, code: int) -> tuple[str, str]:
    if code == errno.EFBIG:
        more = "Allow larger files: ulimit -f unlimited"
    elif code in (errno.EMFILE, errno.ENFILE):
        more = "Allow more open files: ulimit -n 4096"
    else:
        more = "Give /dev/shm more space"
    message = f"Workers could not hand over a batch through shared memory (/dev/shm): {why}."
    return message, f"{more}; or use --workers 0 or a smaller --batch-size."


def _explain_system(error: OSError, text: str) -> tuple[str, str]:
    what = f"{error.filename}: {error.strerror}" if error.filename is not None and error.strerror else text
    again = "run the same command again: it continues where it stopped."
    if error.errno in _FULL:
        fix = f"Free some space, then {again}"
    elif error.errno in (errno.EMFILE, errno.ENFILE):
        fix = "Allow more open files: ulimit -n 4096."
    elif isinstance(error, BrokenPipeError):
        what = "a process that this one was writing to has ended (broken pipe)"
        fix = (
            f"Its own error says why; without one it was killed, perhaps for memory: try fewer --workers. Then {again}"
        )
    elif isinstance(error, ConnectionError | TimeoutError):
        fix = f"Check the network, then {again}"
    else:
        fix = "Check that it exists, its type and its permissions, then run the same command again."
    return f"The system refused: {what.rstrip('.')}.", fix


def validate_world() -> None:
    """Refuse an environment that does not give a rank and a number of processes as torchrun does."""
    values = {}
    for name in _RANKS:
        text = os.environ.get(name) or ("0" if name.endswith("RANK") else "1")
        if not (text.isascii() and text.isdigit()):
            raise UsageError(
                f"{name} is {text!r}, not a number of processes.", f"Start with torchrun, or unset {name}."
            )
        values[name] = int(text)
    rank, size = values["RANK"], values["WORLD_SIZE"]
    if rank >= max(size, 1) or size < 1:
        raise UsageError(
            f"RANK is {rank} and WORLD_SIZE is {size}; a rank must be from 0 to one less than the size.",
            "Start with torchrun, or unset both.",
        )
