"""What Kornia did to a batch, read from the parameters of the draw: where every augmented pixel came from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import kornia.augmentation as K
import numpy as np
import torch
import torch.nn.functional as F
from kornia.augmentation.auto.operations.base import OperationBase
from kornia.augmentation.container.base import ImageSequentialBase
from kornia.constants import DataKey, Resample
from numpy.typing import NDArray
from torch import Tensor, nn

from e2kd.regions import Region

Matrices = NDArray[np.float64]

# What shrinks or grows the canvas without filling: every pixel of the result comes from within the input.
KEEPING = (
    K.CenterCrop, K.LongestMaxSize, K.RandomHorizontalFlip, K.RandomResizedCrop, K.RandomVerticalFlip, K.Resize,
    K.SmallestMaxSize,
)  # fmt: skip
# What fills the pixels that come from outside of the input.
FILLING = (
    K.PadTo, K.RandomAffine, K.RandomCrop, K.RandomPerspective, K.RandomRotation, K.RandomRotation90, K.RandomShear,
    K.RandomTranslate,
)  # fmt: skip
FLIPS = {K.RandomHorizontalFlip: 0, K.RandomVerticalFlip: 1}  # and the axis, x or y, that they reverse
TO_EDGES = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])  # from coordinates of pixel centres to those of edges
TO_CENTRES = np.linalg.inv(TO_EDGES)
CONSTANT = {"zeros", "fill", "constant"}
# Fill of any colour is "outside" for a map; without `align_corners` every operation keeps its own.
MASKS = {DataKey.MASK: {"resample": "bilinear", "fill": 0.0, "fill_value": None, "pad_value": 0.0}}


class Walk(NamedTuple):
    """Where augmented pixels came from; pixel coordinates are those of edges, as in `e2kd.warping.warp_by_matrix`.

    Attributes:
        matrices: augmented pixels -> canonical pixels, [B, 3, 3] float64 on the CPU.
        frames: images on the way; outside of them pixels were filled.
        holes: what was erased.
    """

    matrices: Tensor
    frames: list[Region]
    holes: list[Region]


def pipeline(*operations: Any) -> K.AugmentationSequential:
    """The operations as one Kornia container, after a look at each of them.

    Raises:
        ValueError: for an operation whose effect on the positions of pixels is unknown.
    """
    container = K.AugmentationSequential(*operations, transformation_matrix_mode="skip", extra_args=MASKS)
    container.disable_features = True  # or it keeps the last images
    for operation in leaves(container):
        if (reason := refusal(operation)) is not None:
            raise ValueError(f"JointAugmentation can't take {type(operation).__name__}: {reason}")
    return container


def leaves(module: nn.Module) -> Iterator[nn.Module]:
    """The operations inside of containers and policies."""
    if isinstance(module, OperationBase):
        yield from leaves(module.op)
    elif _is_container(module):
        for child in module.children():
            yield from leaves(child)
    else:
        yield module


def refusal(operation: nn.Module) -> str | None:
    """Why an operation can't be taken, as the rest of a sentence; None if it can."""
    if isinstance(operation, K.MixAugmentationBaseV2):
        return (
            "it mixes, pastes or shuffles images, and what the teacher would say about the result is not in the "
            "cache: neither the logits nor a map, and a pasted map explains another class. Leave it out, or use a "
            "live teacher."
        )
    if not isinstance(operation, K.AugmentationBase2D):
        return (
            "where it moves pixels is unknown. Operations are Kornia's 2D augmentations, or ImageSequential and "
            "AugmentationSequential of them; apply other modules to the images afterwards."
        )
    if type(operation).apply_transform_mask is K.AugmentationBase2D.apply_transform_mask:
        return "Kornia moves pixels with it, but not masks, so no map can follow. RandomElasticTransform is supported."
    return None


def is_rigid(container: nn.Module) -> bool:
    """Whether the geometry of all operations is in matrices, frames and boxes; else it takes a probe image."""
    return all(_is_rigid(operation) for operation in leaves(container))


def _is_rigid(operation: Any) -> bool:
    if isinstance(operation, K.IntensityAugmentationBase2D):
        return type(operation) is K.RandomErasing or not _warps_masks(operation)
    mode = operation.flags.get("padding_mode", operation.flags.get("pad_mode", "zeros"))
    return type(operation) in KEEPING or (
        type(operation) in FILLING and str(getattr(mode, "name", mode)).lower() in CONSTANT
    )


def _warps_masks(operation: K.IntensityAugmentationBase2D) -> bool:
    base = K.IntensityAugmentationBase2D
    return type(operation).apply_transform_mask is not base.apply_transform_mask


def _is_container(module: nn.Module) -> bool:
    return isinstance(module, ImageSequentialBase) and not isinstance(module, (K.PatchSequential, K.VideoSequential))


def walk(container: nn.Module, params: list[Any], batch: int) -> Walk:
    """From the augmented image back to the canonical one, through every operation that was drawn.

    The matrices of a container as Kornia composes them forget what was filled on the way, and policies.

    Args:
        container: whose `is_rigid`.
        params: of one draw, as `container.forward_parameters` gives them.
    """
    matrices = np.tile(np.eye(3), (batch, 1, 1))
    frames, holes = [], []
    for operation, draw in reversed(list(drawn(container, params))):
        if isinstance(operation, K.RandomErasing):
            holes.append(Region(torch.from_numpy(matrices), erased(draw)))
        elif isinstance(operation, K.GeometricAugmentationBase2D):
            matrix, size = matrix_of(operation, draw)
            matrices = np.linalg.inv(matrix) @ matrices
            if type(operation) in FILLING:
                frames.append(Region.frame(torch.from_numpy(matrices), size))
    return Walk(torch.from_numpy(matrices), frames, holes)


def drawn(container: nn.Module, params: list[Any]) -> Iterator[tuple[nn.Module, dict[str, Tensor]]]:
    """The operations of a draw in the order in which they ran, each with its parameters."""
    for name, draw in params:
        module = container.get_submodule(name)
        module = module.op if isinstance(module, OperationBase) else module
        if isinstance(draw, list):
            yield from drawn(module, draw)
        else:
            yield module, draw


def matrix_of(operation: K.GeometricAugmentationBase2D, draw: dict[str, Tensor]) -> tuple[Matrices, tuple[int, int]]:
    """Input pixels -> output pixels, [B, 3, 3] in edge coordinates, and the size (H, W) of the input.

    Kornia's own matrices have the centre of the first pixel at (0, 0), and `forward_input_shape` counts the
    padding of a crop, although the matrix starts before it.
    """
    draw = {key: value.cpu() for key, value in draw.items()}
    batch, channels, height, width = draw["forward_input_shape"].tolist()
    if "padding_size" in draw:
        left, right, top, bottom = draw["padding_size"][0].tolist()
        height, width = height - top - bottom, width - left - right
    matrix = _known_matrix(operation, draw, (height, width))
    if matrix is None:
        blank = torch.empty((), dtype=torch.float64).expand(batch, channels, height, width)
        matrix = operation.generate_transformation_matrix(blank, draw, operation.flags).numpy()
    return TO_EDGES @ matrix @ TO_CENTRES, (height, width)


def _known_matrix(operation: Any, draw: dict[str, Tensor], size: tuple[int, int]) -> Matrices | None:
    """Kornia's own matrix of what is drawn most, without the millisecond that Kornia takes for it; else None."""
    applied = draw["batch_prob"].numpy() > 0.5
    if type(operation) in FLIPS:
        axis = FLIPS[type(operation)]
        matrix = np.tile(np.eye(3), (len(applied), 1, 1))
        matrix[applied, axis, axis], matrix[applied, axis, 2] = -1, size[1 - axis] - 1
        return matrix
    if type(operation) is K.RandomResizedCrop and applied.all() and operation.flags["align_corners"]:
        source, out = (draw[key].numpy().astype(np.float64) for key in ("src", "dst"))
        wide, wide_out = source[:, 2] - source[:, 0], out[:, 2] - out[:, 0]
        if operation.flags["resample"] is not Resample.NEAREST and wide.all() and wide_out.all():
            matrix = np.tile(np.eye(3), (len(source), 1, 1))
            matrix[:, (0, 1), (0, 1)] = wide_out / wide
            matrix[:, :2, 2] = out[:, 0] - source[:, 0] * wide_out / wide
            return matrix
    return None


def erased(draw: dict[str, Tensor]) -> Tensor:
    """The boxes of a RandomErasing, [B, 4] left, top, right, bottom; empty where it was not applied."""
    left, top, width, height = (draw[key].cpu().double() for key in ("xs", "ys", "widths", "heights"))
    applied = (draw["batch_prob"].cpu() > 0.5).double()
    return torch.stack([left, top, left + width * applied, top + height * applied], 1)


def probe(container: K.AugmentationSequential, params: list[Any], like: Tensor) -> tuple[Tensor, Tensor]:
    """Where each augmented pixel came from, read from an image of coordinates that goes the masks' way.

    Args:
        like: the canonical images, [B, 3, H, W].

    Returns:
        Canonical positions weighted with the share that is no fill, and that share: [B, 2, H', W'], [B, 1, H', W'].
        Positions are (x, y) with the frame's edges at -1 and 1.
    """
    image = F.pad(ramps(like, (like.shape[-2], like.shape[-1])), (0, 0, 0, 0, 0, 1), value=1.0)
    moved = container(image.repeat(len(like), 1, 1, 1), params=params, data_keys=["mask"])
    return moved[:, :2], moved[:, 2:]


def ramps(like: Tensor, size: tuple[int, int]) -> Tensor:
    """Positions (x, y) of the pixels of an image of size (H, W), with its edges at -1 and 1, [2, H, W].

    >>> ramps(torch.zeros(1), (1, 2))[0]
    tensor([[-0.5000,  0.5000]])
    """
    y, x = ((2 * torch.arange(n, device=like.device, dtype=like.dtype) + 1) / n - 1 for n in size)
    return torch.stack(torch.broadcast_tensors(x, y[:, None]))
