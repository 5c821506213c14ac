"""What shapes a network's modules return: for images of one size, and for smaller ones."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from e2kd.hooks import Hooks
from e2kd.modes import as_written, evaluating, kept_attributes, kept_buffers, undrawn
from e2kd.outputs import first_tensor
from e2kd.sharding import is_any_sharded

CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d)

Shape = tuple[int, ...]


@dataclass
class Shapes:
    """What modules returned in one forward, or in the part of it that ran.

    Attributes:
        image_size: (H, W) of the images.
        returned: by a module's name, the shape of the first tensor of each of its calls; () for those without one.
        convolved: the shapes of what convolutions and their norms returned, [B, C, h, w].
    """

    image_size: tuple[int, int]
    returned: dict[str, list[Shape]] = field(default_factory=dict)
    convolved: set[Shape] = field(default_factory=set)

    def of(self, name: str, index: int) -> Shape | None:
        """What one of a module's calls returned; None where it did not run."""
        found = self.returned.get(name, [])
        return found[index] if index < len(found) else None


@contextmanager
def noting(model: nn.Module, image_size: tuple[int, int]) -> Iterator[Shapes]:
    """Inside, a forward writes down what its modules return."""
    shapes, hooks = Shapes(image_size), Hooks()

    def note(name: str) -> Any:
        def hook(args: tuple[Any, ...], output: Any) -> None:
            tensor = first_tensor(output)
            shapes.returned.setdefault(name, []).append(() if tensor is None else tuple(tensor.shape))

        return hook

    try:
        for name, module in model.named_modules():
            hooks.after(module, note(name))
            if isinstance(module, CONVOLUTIONS):
                hooks.after(module, lambda args, output: shapes.convolved.add(tuple(output.shape)))
        yield shapes
    finally:
        hooks.remove()


def at_half_size(model: nn.Module, images: Tensor) -> Shapes:
    """What the modules return for images of half the size; what ran of them, for a model that refuses such images.

    Never for larger images: a table of positions that is read past its end kills a process on a GPU. Nothing runs of a
    sharded model, which a forward that stops midway would leave gathered.
    """
    height, width = images.shape[-2] // 2, images.shape[-1] // 2
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        kept_attributes(model),
        evaluating(model),
        as_written(model),
        kept_buffers(model.modules()),
        undrawn(images.device),
        noting(model, (height, width)) as shapes,
        warnings.catch_warnings(),
        suppress(Exception),  # how a model refuses a size is its own affair
    ):
        warnings.simplefilter("ignore")
        if not is_any_sharded(model):
            model(images[:2, :, :height, :width].detach().clone())
    return shapes
