"""Errors that the user can fix, beside `ValueError` and `FileNotFoundError`.

A command shows them as one line. What JAX or XLA raise is not among them: that is a defect, and its
traceback is needed.
"""


class UserError(Exception):
    """Something outside the code must change; the message is one line that says what."""


class MissingPackageError(UserError, ImportError):
    """An optional package is not installed; the message has the pip command."""
