"""The canonical view: the one deterministic image that the teacher sees and every augmentation starts from."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from e2kd.errors import shape
from e2kd.similarity import at_least_float32

FITS = ("crop", "squash")
CHANNELS = (1, 3, 4, 6)
DEEP = (
    'Expected PIL images of 8 bits, but the data set gave one of mode "{mode}", whose values above 255 convert("RGB") '
    "would turn into white. Let the data set bring its values to [0, 255] and give 8 bits, or to [0, 1] and give "
    "floating-point tensors [C, H, W]."
)


@dataclass(frozen=True)
class CanonicalView:
    """Every image as [3, H, W] of one size; a cached map covers exactly this frame, edge to edge.

    Attributes:
        size: (H, W) in pixels; None takes images as they come, which must then be of one size.
        fit: "crop" resizes the shorter side and crops the centre, as validation transforms do;
            "squash" brings the whole image to the size, so that nothing is cut off.

    >>> CanonicalView((4, 4))(torch.zeros(3, 8, 6, dtype=torch.uint8)).shape
    torch.Size([3, 4, 4])
    """

    size: tuple[int, int] | None = None
    fit: str = "crop"

    def __post_init__(self) -> None:
        if self.fit not in FITS:
            raise ValueError(f"Expected fit to be one of {FITS}, but got {self.fit!r}.")
        if self.size is not None and (len(self.size) != 2 or min(self.size) < 1):
            raise ValueError(f"Expected a size (H, W) of at least one pixel, but got {self.size}.")

    def __call__(self, image: Any) -> Tensor:
        """A PIL image, array [H, W, C] or tensor [C, H, W] -> tensor [C, H, W]; uint8 unless it was floating-point.

        PIL images become RGB, whatever their mode.
        """
        if isinstance(image, Tensor):
            return self._fitted(_checked(image))
        if isinstance(image, np.ndarray):
            return self._fitted(_checked(torch.from_numpy(np.array(np.atleast_3d(image))).movedim(-1, 0)))
        if not hasattr(image, "convert"):
            raise TypeError(
                f"Expected a PIL image, an array [H, W, C] or a tensor [C, H, W], but the data set gave "
                f"{type(image).__name__}. Freeze the data set without its transform, or with one that returns these."
            )
        if image.mode.startswith("I") or image.mode == "F":
            raise TypeError(DEEP.format(mode=image.mode))
        return _pixels(self._fitted_pil(image.convert("RGB")))

    def placement(self, height: int, width: int) -> tuple[float, float, float, float]:
        """Where the frame lies in an image [height, width]: top, left, height and width in the image's pixels.

        >>> CanonicalView((256, 256)).placement(100, 200)
        (0.0, 50.0, 100.0, 100.0)
        """
        if self.size is None or self.fit == "squash":
            return 0.0, 0.0, float(height), float(width)
        scale = min(height / self.size[0], width / self.size[1])
        high, wide = self.size[0] * scale, self.size[1] * scale
        return (height - high) / 2, (width - wide) / 2, high, wide

    def _fitted_pil(self, image: Any) -> Any:
        from PIL import Image

        if self.size is None:
            return image
        top, left, high, wide = self.placement(image.height, image.width)
        box = (left, top, left + wide, top + high)
        return image.resize(self.size[::-1], Image.Resampling.BILINEAR, box=box)  # antialiases when it shrinks

    def _fitted(self, image: Tensor) -> Tensor:
        if self.size is None or tuple(image.shape[-2:]) == self.size:
            return image
        top, left, high, wide = (round(v) for v in self.placement(image.shape[-2], image.shape[-1]))
        cut = image[:, top : top + max(high, 1), left : left + max(wide, 1)][None]
        floats = at_least_float32(cut) if cut.is_floating_point() else cut
        resized = F.interpolate(floats, self.size, mode="bilinear", align_corners=False, antialias=True)[0]
        return resized.to(image.dtype)

    def to_json(self) -> dict[str, Any]:
        """What a manifest says of it."""
        return asdict(self) | {"size": None if self.size is None else list(self.size)}

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> CanonicalView:
        """The view that `to_json` described."""
        size = saved["size"]
        return cls(None if size is None else (int(size[0]), int(size[1])), str(saved["fit"]))


def view_of(wanted: int | tuple[int, int] | CanonicalView | None) -> CanonicalView:
    """A view from a side, a size (H, W) or a view.

    >>> view_of(256).size
    (256, 256)
    """
    if isinstance(wanted, CanonicalView):
        return wanted
    return CanonicalView((wanted, wanted) if isinstance(wanted, int) else wanted)


def _pixels(image: Any) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _checked(image: Tensor) -> Tensor:
    if image.ndim == 2:
        image = image[None]
    if image.ndim != 3 or image.shape[0] not in CHANNELS:
        raise ValueError(
            f"Expected an image [C, H, W] with C one of {CHANNELS}, but the data set gave {shape(image.shape)}."
        )
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise TypeError(f"Expected images of uint8 or a floating-point type, but the data set gave {image.dtype}.")
    return image
