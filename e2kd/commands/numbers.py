"""Numbers as a command line says them."""

from __future__ import annotations

import argparse


def count_said(text: str) -> int:
    """A number from 1, for a command line.

    >>> count_said("8")
    8
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, but got {text!r}")
    return int(text)


def percentage_said(text: str) -> float:
    """A number from 0 to 100, for a command line.

    >>> percentage_said("12.5")
    12.5
    """
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not 0 <= number <= 100:
        raise argparse.ArgumentTypeError(f"expected a percentage from 0 to 100, but got {text!r}")
    return number
