"""Every error a user can cause. A message says what was found, what was expected and what to do."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class MllmError(ValueError):
    """Base of all errors that a user can mend.

    Args:
        found: What we saw, with the row id, file or option name it was seen in.
        expected: What would have been right.
        do: What the user can do about it.
    """

    def __init__(self, found: str, *, expected: str, do: str):
        super().__init__(f"found: {found}\nexpected: {expected}\ndo this: {do}")
        self.found, self.expected, self.do = found, expected, do

    def __reduce__(self):
        # Exceptions cross process boundaries (data workers); the default would lose the keyword arguments.
        return (_rebuild, (type(self), self.found, self.expected, self.do))


def _rebuild(kind: type[MllmError], found: str, expected: str, do: str) -> MllmError:
    return kind(found, expected=expected, do=do)


class OptionError(MllmError):
    """A command-line option, a YAML key or a combination of them is wrong."""


class CompositionError(MllmError):
    """An encoder, a connector and a language model cannot be joined."""


class RowError(MllmError):
    """A row is malformed, or its media and placeholders disagree."""


class MediaError(RowError):
    """A media file is missing, unreadable, of another type than it claims, or over a limit."""


class CheckpointError(MllmError):
    """A directory is not a complete checkpoint, or it belongs to another run."""


class TrainingError(MllmError):
    """A run cannot go on, such as with a loss that is no number."""


class ExportError(MllmError):
    """A model has no stock class to be exported to, or the export differs from it."""


class EndpointError(MllmError):
    """A service on another machine refuses us, or does not answer."""


@contextmanager
def user_errors() -> Iterator[None]:
    """For programs: end with the message alone and exit status 2 on an `MllmError`; bugs keep their traceback."""
    try:
        yield
    except MllmError as error:
        sys.stderr.write(f"\n{type(error).__name__}\n{error}\n")
        raise SystemExit(2) from None
