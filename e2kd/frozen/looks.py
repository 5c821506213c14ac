"""What is left of an image in a few numbers: enough to tell whether a picture was replaced or is shown otherwise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from e2kd.frozen.encoding import LARGEST_FLOAT16

SIDE = 4  # cells per axis of what is kept of every image
LOOK = SIDE * SIDE
ALLOWED = 0.01  # mean difference: decoders of JPEG files differ by less, other pictures and transforms by more
COMPARED = 16  # samples, spread over many, that are compared where not every one is

Looks = NDArray[np.float16]


def thumbnail(image: Tensor) -> Tensor:
    """What is left of an image [C, H, W] when it is averaged to 8 x 8 cells, [C, 8, 8]; uint8 counts from 0 to 1.

    It tells an image from a transformed one, and does not mind how a JPEG was decoded.
    """
    pixels = image.float() / 255 if image.dtype == torch.uint8 else image.float()
    return F.adaptive_avg_pool2d(pixels, 8).mul(1000).round().div(1000)


def apart_from(image: Tensor, stored: Sequence[object]) -> float:
    """How far an image [C, H, W] lies from a thumbnail that was stored, in the mean; infinity for other channels."""
    now, then = thumbnail(image), torch.tensor(stored)
    return float((now - then).abs().mean()) if now.shape == then.shape else float("inf")


def looks_of(images: Sequence[Tensor] | Tensor) -> Looks:
    """Images [C, H, W] averaged over channels and to 4 x 4 cells, [B, 16]; uint8 counts from 0 to 1.

    >>> looks_of(torch.full((2, 3, 8, 8), 255, dtype=torch.uint8)).mean(1)
    array([1., 1.], dtype=float16)
    """
    found = np.empty((len(images), LOOK), np.float16)
    for look, image in zip(found, images, strict=True):
        cells = F.adaptive_avg_pool2d(image.mean(0, keepdim=True, dtype=torch.float32), SIDE).flatten()
        inside = cells / 255 if image.dtype == torch.uint8 else cells.clamp(-LARGEST_FLOAT16, LARGEST_FLOAT16)
        look[:] = inside.numpy()
    return found


def apart(now: Looks, then: Looks) -> NDArray[np.float32]:
    """How far looks [B, 16] lie from one another in the mean, [B]."""
    found: NDArray[np.float32] = np.abs(now.astype(np.float32) - then.astype(np.float32)).mean(1)
    return found
