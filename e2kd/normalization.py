"""How images come normalised, how a model expects them, and the way from one to the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from e2kd.bcos.images import channels_of, colours_of, is_bcos
from e2kd.modes import timm_configuration

Normalization = tuple[Sequence[float], Sequence[float]]


def check_pairs(**normalizations: Normalization | None) -> None:
    """Raise a ValueError for normalisations that are no pair of means and standard deviations."""
    for name, pair in normalizations.items():
        if pair is not None and (len(pair) != 2 or any(isinstance(v, (int, float, str)) for v in pair)):
            raise ValueError(
                f"Expected {name} to be (mean, std), a sequence of numbers each, such as ((0.5,) * 3, (0.5,) * 3), but "
                f"got {pair!r}."
            )


def expected_normalization(model: nn.Module, given: Normalization | None) -> Normalization | None:
    """(mean, std) that a model expects: what was said, else [0, 1] of B-cos networks and what timm's models know."""
    if given is not None:
        return given
    if is_bcos(model):
        return (0.0,) * colours_of(model), (1.0,) * colours_of(model)
    configuration = timm_configuration(model)
    mean, std = configuration.get("mean"), configuration.get("std")
    if mean is None or std is None or len(mean) != channels_of(model):  # timm changes in_chans, not the configuration
        return None
    return mean, std


def told_to(
    teacher: nn.Module, given: Normalization | None, wanted: Normalization | None = None
) -> Normalization | None:
    """(mean, std) that images come in, where it is known what the teacher expects; else it gets them as they are."""
    return None if expected_normalization(teacher, wanted) is None else given


def rescaled(images: Tensor, given: Normalization | None, wanted: Normalization | None) -> Tensor:
    """Images from one normalisation to another; as they are where one is not known."""
    if given is None or wanted is None:
        return images
    for name, values in {"input": given[0], "teacher": wanted[0]}.items():
        if len(values) not in (1, images.shape[1]):
            raise ValueError(
                f"Expected {name}_normalization of one channel or of the images' {images.shape[1]}, but got "
                f"{len(values)} means."
            )
    (mean_in, std_in), (mean, std) = (tuple(torch.tensor(v, dtype=torch.float64) for v in n) for n in (given, wanted))
    scale, shift = std_in / std, (mean_in - mean) / std
    if torch.allclose(scale, torch.ones_like(scale)) and torch.allclose(shift, torch.zeros_like(shift)):
        return images
    scale, shift = (v[:, None, None].to(images, non_blocking=True) for v in (scale, shift))  # one is for all channels
    return images * scale + shift
