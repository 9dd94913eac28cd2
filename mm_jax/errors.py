"""The one exception that means "the user gave us something we cannot use"."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """A mistake in a config, file, image, request or checkpoint.

    The message is one line: what is wrong, where, and what would be right. Commands print it without a
    traceback and exit with code 2; the Python API lets it propagate.
    """


def nearest(name: str, options: Iterable[str]) -> str:
    """A hint for a misspelt name, ready to append to a message.

    >>> nearest("lenght", ["length", "rows"])
    '; did you mean "length"?'
    >>> nearest("x", ["length", "rows"])
    '; known: length, rows'
    """
    options = sorted(options)
    close = get_close_matches(name, options, n=1)
    return f'; did you mean "{close[0]}"?' if close else "; known: " + ", ".join(options)
