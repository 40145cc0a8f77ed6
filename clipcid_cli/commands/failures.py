"""What went wrong outside clipcid: memory, disks, files and other processes, told from bugs by what libraries raise.

Nothing here imports PyTorch: its errors are recognised by their names and words.
"""

from __future__ import annotations

import errno
import os

from clipcid_cli.errors import ClipcidError, UsageError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "Cannot allocate memory")
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
_NO_PEER = ("gloo", "NCCL", "ncclRemoteError", "TCPStore", "Connection closed by peer", "Connection reset by peer")
_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def explain(error: Exception, command: str = "") -> ClipcidError:
    """Return the error to show for one that no step has foreseen.

    Args:
        command: The subcommand that ran, whose flags a fix may name.
    """
    text = " ".join(str(error).split())[:300] or type(error).__name__
    if isinstance(error, MemoryError) or any(words in text for words in _NO_MEMORY):
        return _explain_memory(text, command)
    if isinstance(error, OSError):
        return _explain_system(error, text)
    # torch.distributed's errors are RuntimeErrors, of which those of gloo have no class of their own.
    if isinstance(error, RuntimeError) and (
        type(error).__name__.startswith("Dist") or any(words in text for words in _NO_PEER)
    ):
        return ClipcidError(
            f"Another process of the run has ended, or cannot be reached: {text.rstrip('.')}.",
            "Its own error says why; without one it was killed, perhaps for memory. Run the same command again: it "
            "continues where it stopped.",
        )
    return ClipcidError(
        f"{type(error).__name__}: {text}",
        "This is a bug in clipcid or a failure of the machine. Add --debug to see where it happened.",
    )


def _explain_memory(text: str, command: str) -> ClipcidError:
    on_gpu = any(words in text for words in _OF_GPU)
    what = "The memory of the GPU ran out" if on_gpu else "Memory ran out"
    less = _LESS_MEMORY.get(command, "a smaller --batch-size")
    if not on_gpu and command in _WITH_WORKERS:
        less += " or fewer --workers"
    machine = "a GPU with more memory" if on_gpu else "a machine with more memory"
    return ClipcidError(f"{what}: {text.rstrip('.')}.", f"Use {less}; or use {machine}.")


def _explain_system(error: OSError, text: str) -> ClipcidError:
    what = f"{error.filename}: {error.strerror}" if error.filename is not None and error.strerror else text
    if error.errno in _FULL:
        fix = "Free some space, then run the same command again: it continues where it stopped."
    elif error.errno in (errno.EMFILE, errno.ENFILE):
        fix = "Allow more open files: ulimit -n 4096."
    elif isinstance(error, BrokenPipeError):
        what = "a process that this one was writing to has ended (broken pipe)"
        fix = (
            "Its own error says why; without one it was killed, perhaps for memory: try fewer --workers. Run the same "
            "command again: it continues where it stopped."
        )
    elif isinstance(error, ConnectionError | TimeoutError):
        fix = "Check the network, then run the same command again: it continues where it stopped."
    else:
        fix = "Check that it exists, what it is and its permissions, then run the same command again."
    return ClipcidError(f"The system refused: {what.rstrip('.')}.", fix)


def read_world() -> tuple[int, int]:
    """Return this process's rank and the number of processes, as torchrun's environment gives them.

    Raises:
        UsageError: when one of its variables is not a number, or they contradict each other.
    """
    found = {}
    for name in _RANKS:
        text = os.environ.get(name) or ("0" if name.endswith("RANK") else "1")
        if not (text.isascii() and text.isdigit()):
            raise UsageError(
                f"{name} is {text!r}, not a number of processes.", f"Start with torchrun, or unset {name}."
            )
        found[name] = int(text)
    rank, size = found["RANK"], found["WORLD_SIZE"]
    if rank >= max(size, 1) or size < 1:
        raise UsageError(
            f"RANK is {rank} and WORLD_SIZE is {size}; a rank is from 0 to the size less 1.",
            "Start with torchrun, or unset both.",
        )
    return rank, size
