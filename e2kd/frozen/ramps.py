"""Images of coordinates: what an operation does to one shows where it moves pixels."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from e2kd.frozen.geometry import Step, size_of

LEVELS = 255  # of a ramp in whole numbers
MOST = 0.75  # share of the pixels that has to agree: edges are resampled in many ways

MOVED_OTHERWISE = (
    "{name} moves pixels otherwise than e2kd takes it to: {error:.1f} pixels away, where {limit:.1f} are allowed. Is "
    "it a version that e2kd does not know? Maps would not follow their images: leave it out, or augment whole batches "
    "with JointAugmentation."
)


def check_followed(run: Callable[[Any], tuple[Any, list[Step]]], image: Any, name: str) -> None:
    """Run an operation on an image of coordinates like this one, and compare where its pixels came from.

    No random numbers are used up.

    Raises:
        RuntimeError: when most pixels came from elsewhere.
    """
    ramp = ramp_like(image)
    with _undrawn():
        moved, steps = run(ramp)
    if not steps:
        return
    source, out = size_of(ramp), size_of(moved)
    expected = positions(steps[0].back, out)
    size = np.array([source[1], source[0]])[:, None, None]
    steepest = float(np.abs(np.diff(expected * size, axis=2)).max(initial=1))
    steepest = max(steepest, float(np.abs(np.diff(expected * size, axis=1)).max(initial=1)))
    found = coordinates(moved)
    inner = (np.abs(expected * size - size / 2) < size / 2 - 3 * steepest - 1).all(0)
    error = np.abs((found - expected[: len(found)]) * size[: len(found)]).max(0)[inner]
    limit = steepest + (0 if _is_exact(ramp) else size.max() / LEVELS)
    if error.size and (worst := float(np.quantile(error, MOST))) > limit:
        raise RuntimeError(MOVED_OTHERWISE.format(name=name, error=worst, limit=limit))


def ramp_like(image: Any) -> Any:
    """An image of the same kind and size with x and y in its first channels, from 0 to 1 or `LEVELS`."""
    height, width = size_of(image)
    x, y = ((np.arange(n) + 0.5) / n for n in (width, height))
    ramps = np.stack([*np.broadcast_arrays(x, y[:, None])])
    if not isinstance(image, Tensor):
        from PIL import Image

        levels = np.rint(ramps * LEVELS).astype(np.uint8)
        return Image.fromarray(np.stack([*levels, np.zeros_like(levels[0])], 2))
    ramp = torch.zeros(image.shape, dtype=image.dtype)
    values = torch.from_numpy(ramps if _is_exact(ramp) else np.rint(ramps * LEVELS)).to(image.dtype)
    ramp[:2] = values[: len(ramp)]
    return ramp


def coordinates(image: Any) -> NDArray[np.float64]:
    """What `ramp_like` wrote, after it was moved: [2, H, W], of images with one channel [1, H, W]."""
    if isinstance(image, Tensor):
        values = image[:2].double().numpy()
    else:
        values = np.asarray(image)[:, :, :2].transpose(2, 0, 1).astype(np.float64)
    return values if _is_exact(image) else values / LEVELS


def positions(back: NDArray[np.float64], out: tuple[int, int]) -> NDArray[np.float64]:
    """Where the centres of pixels of a result come from, in the unit square: (x, y) as [2, H, W]."""
    x, y = ((np.arange(n) + 0.5) / n for n in (out[1], out[0]))
    u, v, depth = np.einsum("ij,jhw->ihw", back, np.stack([*np.broadcast_arrays(x, y[:, None], 1.0)]))
    return np.stack([u / depth, v / depth])


def _is_exact(image: Any) -> bool:
    return isinstance(image, Tensor) and image.is_floating_point()


@contextmanager
def _undrawn() -> Iterator[None]:
    """Random numbers drawn inside are drawn again afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002 (timm draws from it)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])
