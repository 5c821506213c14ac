"""Images to try a model on before the first real ones come."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from e2kd.bcos.images import channels_of
from e2kd.errors import REFUSALS
from e2kd.modes import as_written, evaluating, kept_buffers, timm_configuration, undrawn

SIZES = (224, 256, 299, 384, 192, 160, 128, 96, 64, 32, 28)  # large first: small images hide late layers


def example_images(model: nn.Module) -> Tensor | None:
    """Two images [2, C, H, W] of noise that the model accepts, or None if no usual size fits.

    None too for lazy layers that have yet to see images, since noise would settle their sizes for good. The size is the
    one in the model's timm or Hugging Face configuration, else the first usual one that runs.

    >>> example_images(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))).shape
    torch.Size([2, 3, 32, 32])
    """
    return next(accepted_images(model), None)


def accepted_images(model: nn.Module, *others: nn.Module) -> Iterator[Tensor]:
    """Such images of each size that the model accepts; sizes in the configurations of others come after its own."""
    where = next(model.parameters(), None)
    if where is None or where.is_meta or any(map(is_lazy, chain(model.parameters(), model.buffers()))):
        return
    channels = channels_of(model)
    generator = torch.Generator().manual_seed(0)
    known = chain.from_iterable(map(_configured, (model, *others)))
    for height, width in dict.fromkeys(chain(known, zip(SIZES, SIZES, strict=True))):
        images = torch.randn(2, channels, height, width, generator=generator).to(where.device, where.dtype)
        if refusal(model, images) is None:
            yield images


def refusal(model: nn.Module, images: Tensor) -> Exception | None:
    """The error by which a model refuses images; None if it runs."""
    try:
        with _trying(model, images.device), torch.no_grad():
            model(images)
    except REFUSALS as error:
        return error
    return None


@contextmanager
def _trying(model: nn.Module, device: torch.device) -> Iterator[None]:
    """A forward inside leaves the model as it was."""
    with evaluating(model), as_written(model), kept_buffers(model.modules()), undrawn(device):
        yield


def _configured(model: nn.Module) -> list[tuple[int, int]]:
    known: list[Any] = [
        getattr(getattr(model, "patch_embed", None), "img_size", None),
        (timm_configuration(model).get("input_size") or ())[1:],
        getattr(getattr(model, "config", None), "image_size", None),
    ]
    return [(s, s) if isinstance(s, int) else tuple(s) for s in known if isinstance(s, int) or _is_pair(s)]


def _is_pair(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(v, int) for v in value)
