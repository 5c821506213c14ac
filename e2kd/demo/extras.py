"""What the demo needs beyond torch, and the sentence a user sees without it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class MissingExtra(ImportError):
    """A package of the extra `demo` is not installed."""


@contextmanager
def needs(package: str) -> Iterator[None]:
    """Turns a failing import of the package into one sentence that says what to install.

    >>> with needs("a-package"):
    ...     raise ImportError
    Traceback (most recent call last):
    e2kd.demo.extras.MissingExtra: the demo needs a-package: pip install "e2kd[demo]"
    """
    try:
        yield
    except ImportError as error:
        raise MissingExtra(f'the demo needs {package}: pip install "e2kd[demo]"') from error
