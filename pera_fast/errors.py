"""Errors that the user can mend: one clear line, no traceback, exit code 2."""


class UserError(Exception):
    """Wrong usage, configuration or data.

    The message is one line that says what was wrong, where, and what to do about it. The command line prints it
    without a traceback and exits with code 2.
    """

    exit_code = 2


def one_line(value: object, most: int = 300) -> str:
    """A value as text for a message: on one line, cut where it is longer than `most` characters."""
    text = " ".join(str(value).split())
    return text if len(text) <= most else f"{text[:most]}..."
