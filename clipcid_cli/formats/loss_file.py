"""A loss from a user's own Python file: ``my_losses.py:name``. Read and checked here; nothing of it runs."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
from collections.abc import Collection
from functools import cached_property

from clipcid_cli.errors import UsageError
from clipcid_cli.formats.files import read_regular

_SUFFIX = ".py"
# What a loss may learn, and is called with beside its batch.
SCALE, FUSION = "scale", "fusion"


@dataclasses.dataclass(frozen=True)
class LossFile:
    """A function of a file, as it was read."""

    path: str
    name: str
    source: bytes
    arguments: frozenset[str]  # what it takes beside its batch

    @cached_property
    def hash(self) -> str:
        """Of the whole source."""
        return f"blake2b:{hashlib.blake2b(self.source, digest_size=16).hexdigest()}"


def names_loss_file(name: str) -> bool:
    """Tell whether a loss is named as a function in a file."""
    return name.rpartition(":")[0].endswith(_SUFFIX)


def read_loss_file(name: str, sample_inputs: Collection[str] = ()) -> LossFile:
    """Read ``PATH.py:FUNCTION``, and check without running it that there is such a function, to be called with a batch.

    Args:
        sample_inputs: Names of the numbers of each sample that it may take.
    """
    path, _, function = name.rpartition(":")
    try:
        source = read_regular(path)
    except OSError as error:
        raise UsageError(
            f"--loss {name}: {path} cannot be read: {error.strerror or error}.", "Give the path of your Python file."
        ) from error
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        what = error.msg if isinstance(error, SyntaxError) else error
        raise UsageError(f"--loss {name}: {path}{line} is not Python: {what}.", "Correct the file.") from error
    functions = {node.name: node.args for node in tree.body if isinstance(node, ast.FunctionDef)}
    if function not in functions:
        others = ", ".join(functions) or "none"
        raise UsageError(f"--loss {name}: {path} defines no function {function!r}.", f"Its functions are: {others}.")
    arguments = functions[function]
    taken = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    further = [*taken[1:], *(argument.arg for argument in arguments.kwonlyargs)]
    allowed = [SCALE, FUSION, *sample_inputs]
    if not taken or not set(further) <= {*allowed}:
        raise UsageError(
            f"--loss {name}: {function}({', '.join([*taken[:1], *further])}) cannot be called as a loss.",
            f"Define it as {function}(batch), or with some of: {', '.join(allowed)}.",
        )
    return LossFile(path, function, source, frozenset(further))
