"""The sentences users see: what was expected, what came, what to do."""

from __future__ import annotations

import difflib
import math
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

OURS = ("e2kd", "torch")  # packages whose lines say nothing to the user
REFUSALS = (RuntimeError, ValueError, AssertionError, TypeError, IndexError)  # how models refuse images


class NoEffectWarning(UserWarning):
    """A part of the loss has no effect on training, although nothing crashed."""


class UnsupportedModel(ValueError):
    """A model that e2kd can't explain as asked; the message says what to do."""


class Misplaced(RuntimeError):
    """A criterion called where it can't work; never the fault of the network that runs at the time."""


def warn_user(message: str, category: type[Warning] = NoEffectWarning) -> None:
    """Warn at the nearest line that is neither e2kd's nor torch's: the user's own, or that of their trainer.

    A fixed stacklevel would depend on how a module is called: hooks, wrappers and `torch.compile` put frames of their
    own between.
    """
    if torch.compiler.is_compiling():  # which can't follow frames
        torch.compiler.disable(warn_user)(message, category)
        return
    level, frame = 1, sys._getframe()
    while frame.f_globals.get("__name__", "").split(".")[0] in OURS and frame.f_back is not None:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def unknown_layer(name: str, known: Iterable[str]) -> UnsupportedModel:
    """The error for a layer name that does not exist, with the names that come close."""
    names = [n for n in known if n]
    tail = name.split(".")[-1]
    near = difflib.get_close_matches(name, names, n=4) or [n for n in names if tail in n][:4] or names[-4:]
    return UnsupportedModel(
        f"The model has no layer named {name!r}. Names that come close: {', '.join(near)}. "
        "`dict(model.named_modules())` lists all of them."
    )


def shape(tensor_shape: Iterable[int]) -> str:
    """A shape in brackets, the way the docstrings write it.

    >>> shape((2, 3))
    '[2, 3]'
    """
    return "[" + ", ".join(str(n) for n in tensor_shape) + "]"


def check_weight(name: str, value: float) -> None:
    """Raise a ValueError for a weight that no term can have."""
    if not 0 <= value < math.inf:
        raise ValueError(f"Expected a finite {name} >= 0, but got {value}. 0 switches that term off.")


def check_temperature(value: float) -> None:
    """Raise a ValueError for a τ that no logits can be divided by."""
    if not 0 < value < math.inf:
        raise ValueError(f"Expected a finite temperature > 0, but got {value}. 1 leaves the logits as they are.")


def check_reduction(value: str) -> None:
    """Raise a ValueError for a reduction that the losses don't have."""
    if value not in ("mean", "none"):
        raise ValueError(
            f"Expected reduction to be 'mean' or 'none', but got {value!r}. For a sum, add up what 'none' gives."
        )


def check_names(**options: object) -> None:
    """Raise a TypeError for one name in the place of a list of them, whose letters would be taken for names.

    >>> check_names(layers="layer3")
    Traceback (most recent call last):
    TypeError: Expected layers to be a list of names, but got 'layer3'. Pass layers=['layer3'].
    """
    for option, names in options.items():
        if isinstance(names, str):
            raise TypeError(f"Expected {option} to be a list of names, but got {names!r}. Pass {option}=[{names!r}].")


def check_batch_size(value: int | None) -> None:
    """Raise a ValueError for a number of images that no forward can be of."""
    if value is not None and not (value >= 1 and value % 1 == 0):
        raise ValueError(f"Expected batch_size to be a whole number from 1, or None for all images, but got {value}.")


@contextmanager
def taking_images(who: str, model: object, images: Iterable[int], advice: str) -> Iterator[None]:
    """Says which model it was that could not take images of a shape.

    Args:
        who: its role, such as "teacher".
        model: the model itself.
        images: their shape.
        advice: what to do.

    >>> with taking_images("teacher", "net", (2, 3), "Use others."):
    ...     raise IndexError("too few dimensions")
    Traceback (most recent call last):
    ValueError: The teacher str can't take images [2, 3]: too few dimensions. Use others.
    """
    try:
        yield
    except (UnsupportedModel, Misplaced, torch.OutOfMemoryError):  # trainers make batches smaller after the last
        raise
    except REFUSALS as error:
        raise ValueError(
            f"The {who} {type(model).__name__} can't take images {shape(images)}: {error}. {advice}"
        ) from error
