"""Errors that a user can cause and fix. Everything else is a bug and keeps its traceback under ``--debug``."""


class ClipcidError(Exception):
    """A step cannot continue, and the user can do something about it.

    Attributes:
        message: What is wrong, where, and both numbers when two disagree.
        fix: What to type or change; may be empty only when the message already says it.
        already_reported: Whether another process of the run prints it, so that the user reads it once.
    """

    exit_code = 1

    def __init__(self, message: str, fix: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.fix = fix
        self.already_reported = False

    def __str__(self) -> str:
        return f"{self.message}\n{self.fix}" if self.fix else self.message

    def __reduce__(self) -> tuple[type["ClipcidError"], tuple[str, str]]:
        """Pickle by message and fix: errors of one process are told to the others and to the parent of a worker."""
        return type(self), (self.message, self.fix)


class UsageError(ClipcidError):
    """The command line itself does not make sense; nothing was read or written."""

    exit_code = 2
