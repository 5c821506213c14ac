"""One draw of Kornia's augmentations for images and for what a frozen teacher says about them."""

from __future__ import annotations

from typing import Any

import kornia.augmentation as K
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from e2kd.errors import shape
from e2kd.kornia_stages import drawn, is_rigid, pipeline, probe, ramps, walk
from e2kd.regions import project, visible
from e2kd.showing import shown
from e2kd.taught import Taught
from e2kd.warping import warp, warp_by_matrix

ALLOWED = 0.5  # pixels between two ways of telling where a pixel came from
PARTS = 4  # of an output cell per axis that are read from a probe image


class JointAugmentation(nn.Module):
    """Kornia augmentations of a training batch, images and frozen maps alike.

    Where an operation moves pixels, the maps move with them; where it fills or erases pixels, maps are zero and
    `valid` counts the share of each cell that is left; colours leave maps alone. The maps are never blown up to the
    image's size: their own cells are followed back through the operations. Labels and logits stay as they are.

    Supported are Kornia's rigid operations, crops, resizes, RandomErasing, everything about colours, RandAugment and
    its relatives, and ImageSequential or AugmentationSequential of all these. RandomElasticTransform, padding other
    than constant and classes of your own need an extra probe image at each step, which costs about as much as
    augmenting the image. The first batch with each operation is also run through such a probe, and training stops if
    the two disagree.

    Kornia draws from torch's global generator of the CPU: seed each rank differently
    (`torch.manual_seed(seed + rank)`), or all ranks draw the same augmentations. The module has nothing to move to a
    GPU: it works where the images are. Images are augmented in float32 or float64, without autocast and without
    gradient. Augment training batches alone; evaluation needs none of this.

    Args:
        operations: modules of `kornia.augmentation`.
        size: grid (n, m) of the maps that come out. None: the grid they come with.

    Raises:
        ValueError: for an operation whose effect on the positions of pixels is unknown.

    >>> import kornia.augmentation as K
    >>> augmentation = JointAugmentation(K.RandomHorizontalFlip(p=1.0), K.ColorJitter(0.1, 0.1, 0.1, 0.1))
    >>> maps = torch.tensor([[[[1., 2.], [3., 4.]]]])
    >>> taught = Taught(torch.tensor([0]), torch.zeros(1, 10), maps, torch.ones(1, 1, 2, 2), torch.tensor([3]))
    >>> images, taught = augmentation(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), taught)
    >>> images.dtype, taught.maps
    (torch.float32, tensor([[[[2., 1.],
              [4., 3.]]]]))
    """

    def __init__(self, *operations: nn.Module, size: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.operations = pipeline(*operations)
        self.size = size
        self.rigid = is_rigid(self.operations)
        self.verified: set[str] = set()

    def extra_repr(self) -> str:
        """The setting; the operations are shown below."""
        return shown(size=self.size)

    @torch.no_grad()
    def forward(self, images: Tensor, taught: Taught) -> tuple[Tensor, Taught]:
        """Augment one batch.

        Args:
            images: canonical images, [B, 3, H, W]; uint8, or floating point in [0, 1].
            taught: what `FrozenDataset` gave with them.

        Returns:
            Images, in [0, 1] and float32 for uint8, else in their own type; and `taught` with the maps and `valid` of
            the augmented images.

        Raises:
            TypeError: for labels that are no `Taught`, or images of another type.
            ValueError: for shapes that don't belong together.
            RuntimeError: when images and maps would not move alike.
        """
        _check(images, taught)
        pixels = _as_float(images)
        with torch.autocast(pixels.device.type, enabled=False):
            params = self.operations.forward_parameters(pixels.shape)
            augmented = self.operations(pixels, params=params)
            if taught.explains:
                taught = self._follow(pixels, augmented, params, taught)
        return augmented.to(images.dtype) if images.is_floating_point() else augmented, taught

    def _follow(self, pixels: Tensor, augmented: Tensor, params: list[Any], taught: Taught) -> Taught:
        """What the teacher says about the augmented images."""
        known = torch.cat([taught.maps, taught.valid], 1)
        if self.rigid:
            self._verify(pixels, params)
            way = walk(self.operations, params, len(pixels))
            sizes = _size(augmented), _size(pixels)
            known, _ = warp_by_matrix(known, way.matrices, *sizes, frames=way.frames, holes=way.holes, size=self.size)
        else:
            known = _by_probe(known, *probe(self.operations, params, pixels), self.size or _size(known))
        return taught._replace(maps=known[:, :-1], valid=known[:, -1:])

    def _verify(self, pixels: Tensor, params: list[Any]) -> None:
        """Compare the way back with a probe image whenever an operation is drawn for the first time."""
        new = {_name(operation) for operation, _ in drawn(self.operations, params)} - self.verified
        if new and _disagreement(self.operations, params, pixels):
            for last in range(1, len(params) + 1):
                if reason := _disagreement(self.operations, params[:last], pixels):
                    names = ", ".join(
                        _name(operation) for operation, _ in drawn(self.operations, params[last - 1 : last])
                    )
                    raise RuntimeError(
                        f"{names} moves images and maps differently: {reason}. With this version of Kornia the maps of "
                        "a frozen teacher would not follow the images; leave it out, or use a live teacher."
                    )
        self.verified |= new


def usual_augmentations(size: tuple[int, int]) -> dict[str, JointAugmentation]:
    """What training usually does to images of a size (H, W), one at a time and by name.

    >>> list(usual_augmentations((224, 224)))
    ['flip', 'crop of 25-100 %', 'crop of 8-100 %', 'shift by up to 1/8', 'rotation by up to 30°', 'RandAugment']
    """
    return {
        "flip": JointAugmentation(K.RandomHorizontalFlip(p=1.0)),
        "crop of 25-100 %": JointAugmentation(K.RandomResizedCrop(size, (0.25, 1.0), cropping_mode="resample")),
        "crop of 8-100 %": JointAugmentation(K.RandomResizedCrop(size, (0.08, 1.0), cropping_mode="resample")),
        "shift by up to 1/8": JointAugmentation(K.RandomCrop(size, padding=(size[1] // 8, size[0] // 8))),
        "rotation by up to 30°": JointAugmentation(K.RandomRotation(30.0, p=1.0)),
        "RandAugment": JointAugmentation(K.auto.RandAugment(n=2, m=9)),
    }


def _check(images: Tensor, taught: Taught) -> None:
    if not isinstance(taught, Taught):
        raise TypeError(
            f"Expected images and the Taught of a FrozenDataset, but the targets are of type {type(taught).__name__}. "
            "JointAugmentation is for training batches; leave it out where you evaluate."
        )
    if not (images.dtype == torch.uint8 or images.is_floating_point()):
        raise TypeError(f"Expected images in uint8 or floating point, but they are {images.dtype}.")
    if images.ndim != 4 or len(images) != len(taught.maps):
        raise ValueError(
            f"Expected images [B, 3, H, W] with maps [B, C, h, w] of the same batch, but they are "
            f"{shape(images.shape)} and {shape(taught.maps.shape)}. Augment after batching."
        )


def _as_float(images: Tensor) -> Tensor:
    """In [0, 1]; half precision is too coarse for Kornia's coordinates."""
    if images.dtype == torch.uint8:
        return images.float().div_(255)
    return images if images.dtype == torch.float64 else images.float()


def _name(operation: nn.Module) -> str:
    return type(operation).__name__


def _size(tensor: Tensor) -> tuple[int, int]:
    return tensor.shape[-2], tensor.shape[-1]


def _by_probe(maps: Tensor, positions: Tensor, share: Tensor, out: tuple[int, int]) -> Tensor:
    """Maps read where a probe image says, weighted with the share that is no fill, [B, C, n, m].

    A sample that did not move stays as it is.
    """
    s = max(1, min(PARTS, share.shape[-2] // out[0], share.shape[-1] // out[1]))
    parts = (out[0] * s, out[1] * s)
    weight = F.adaptive_avg_pool2d(share, parts)
    points = (F.adaptive_avg_pool2d(positions, parts) / weight.clamp(min=1e-6)).movedim(1, 3).to(maps)
    warped, _ = warp(maps, points, weight[:, 0].to(maps), s)
    if out != _size(maps):
        return warped
    drift = (positions - ramps(positions, _size(share))).abs().amax((1, 2, 3)) * max(_size(share)) / 2
    still = (drift < ALLOWED) & (share.amin((1, 2, 3)) > 0.999)
    return torch.where(still.to(maps.device)[:, None, None, None], maps, warped)


def _disagreement(operations: K.AugmentationSequential, params: list[Any], pixels: Tensor) -> str | None:
    """In words, if a probe image came from elsewhere than the matrices say, or is filled elsewhere."""
    probed, share = probe(operations, params, pixels)
    way = walk(operations, params, len(pixels))
    every = max(1, max(_size(share)) // 64)
    y, x = (torch.arange(0, n, every, dtype=torch.float64) + 0.5 for n in _size(share))
    probed, share = (part[..., ::every, ::every].cpu().double() for part in (probed, share))
    inside = visible(way.frames, way.holes, x[None, None], y[None, :, None], 1.0)[:, None]
    walked = torch.stack(project(way.matrices, x[None, None], y[None, :, None])[:2], 1)
    edges = torch.tensor([[[pixels.shape[-1]]], [[pixels.shape[-2]]]])
    apart = (walked - (probed / share.clamp(min=1e-6) + 1) * edges / 2).norm(dim=1, keepdim=True)
    sure = share > 0.999
    distance = ((apart * sure).sum((1, 2, 3)) / sure.sum((1, 2, 3)).clamp(min=1)).max()
    filled = (inside - share).abs().mean((1, 2, 3)).max()
    if distance > ALLOWED:
        return f"{distance:.1f} pixels apart in the mean (allowed: {ALLOWED})"
    if filled > sum(1 / n for n in _size(share)):
        return f"{filled:.1%} of the pixels are filled in one and not in the other"
    return None
