"""What images a network takes: colours in [0, 1] alone, or with their inverse."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from e2kd.bcos.convolution import BcosConv2d
from e2kd.bcos.encoding import AddInverse
from e2kd.bcos.linear import BcosLinear
from e2kd.bcos.tokens import Patches

LOWEST, HIGHEST = -0.5, 1.5  # sharp interpolation leaves [0, 1] by less; images with mean 0 or in 0...255 by more
ROUNDING = 1e-2


def is_bcos(model: nn.Module) -> bool:
    """Whether a model has B-cos layers.

    >>> is_bcos(nn.Sequential(BcosLinear(4, 2))), is_bcos(nn.Linear(4, 2))
    (True, False)
    """
    return any(isinstance(module, (BcosConv2d, BcosLinear)) for module in model.modules())


def changed_in_place(model: nn.Module) -> tuple[str, str] | None:
    """Names of a B-cos layer and of the module behind it in an `nn.Sequential` that changes what it returned in place.

    >>> changed_in_place(nn.Sequential(BcosConv2d(6, 8, 3), nn.ReLU(inplace=True)))
    ('0', '1')
    """
    for parent, sequence in model.named_modules():
        names = [f"{parent}.{name}".lstrip(".") for name, _ in sequence.named_children()]
        if isinstance(sequence, nn.Sequential):
            for (first, second), behind in zip(pairwise(sequence), pairwise(names), strict=True):
                if isinstance(first, (BcosConv2d, BcosLinear)) and getattr(second, "inplace", False):
                    return behind
    return None


def encoder_of(model: nn.Module) -> str | None:
    """The name of the AddInverse inside of a model; None where images must come encoded.

    >>> encoder_of(nn.Sequential(AddInverse(), BcosConv2d(6, 8, 3)))
    '0'
    """
    return next((name for name, module in model.named_modules() if name and isinstance(module, AddInverse)), None)


def channels_of(model: nn.Module) -> int:
    """Channels of the images [B, C, H, W] that a model takes, read from its first layer; 3 where that can't be read.

    >>> channels_of(BcosConv2d(6, 8, 3)), channels_of(nn.Sequential(AddInverse(), BcosConv2d(6, 8, 3)))
    (6, 3)
    """
    cells = 1
    for module in model.modules():
        if isinstance(module, Patches):
            cells = module.size**2
        entering = _entering(module, cells)
        if entering is not None:
            return entering if encoder_of(model) is None else entering // 2
    return 3


def _entering(module: nn.Module, cells: int) -> int | None:
    if isinstance(module, (nn.Conv2d, BcosConv2d)):
        return module.in_channels
    return module.in_features // cells if isinstance(module, BcosLinear) else None


def colours_of(model: nn.Module) -> int:
    """Colours of the images before any encoding: 3 for a B-cos network of RGB images, encoded inside or outside of it.

    >>> colours_of(BcosConv2d(6, 8, 3))
    3
    """
    channels = channels_of(model)
    encoded_outside = is_bcos(model) and encoder_of(model) is None and channels % 2 == 0
    return channels // 2 if encoded_outside else channels


def encoded(images: Tensor, channels: int) -> Tensor:
    """Images as a network with so many channels takes them: with their inverse where it takes twice as many.

    >>> encoded(torch.rand(1, 3, 2, 2), 6).shape, encoded(torch.rand(1, 3, 2, 2), 3).shape
    (torch.Size([1, 6, 2, 2]), torch.Size([1, 3, 2, 2]))
    """
    return AddInverse()(images) if 2 * images.shape[1] == channels else images


def as_encoded(images: Tensor, model: nn.Module) -> Tensor:
    """Images in [0, 1] of a model's channels, the second half the inverse of the first where it takes them encoded."""
    colours = colours_of(model)
    return AddInverse()(images[:, :colours]) if images.shape[1] == 2 * colours else images


def decoded(images: Tensor) -> Tensor:
    """Encoded images [B, 2C, H, W] without their inverse [B, C, H, W].

    Raises:
        ValueError: when the second half is not the inverse of the first (looked at on the CPU alone).

    >>> decoded(AddInverse()(torch.full((1, 3, 1, 1), 0.25))).flatten()
    tensor([0.2500, 0.2500, 0.2500])
    """
    colours, inverse = images.chunk(2, 1)
    if images.device.type == "cpu" and float((colours + inverse - 1).abs().amax()) > ROUNDING:
        raise ValueError(
            f"Expected images [B, {images.shape[1]}, H, W] to be colours and their inverse, as AddInverse makes them, "
            "since the other network takes colours alone, but the halves don't add up to 1. Augment before you encode."
        )
    return colours


def check_range(images: Tensor, who: str) -> None:
    """Raise a ValueError for images that are clearly not in [0, 1], as B-cos networks expect them.

    >>> check_range(torch.tensor([-2.1, 2.6]), "teacher")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: The teacher is a B-cos network, which expects images in [0, 1], but these reach from -2.1 to 2.6. ...
    """
    low, high = (float(value) for value in torch.aminmax(images.detach()))
    if not LOWEST <= low <= high <= HIGHEST:
        raise ValueError(
            f"The {who} is a B-cos network, which expects images in [0, 1], but these reach from {low:.3g} to "
            f"{high:.3g}. Leave mean and std out of its transforms; where the other network needs them, say how images "
            "are normalised through input_normalization=(mean, std)."
        )
