"""Where the objects of images are: boxes as masks, and one row for every class of an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from e2kd.errors import shape
from e2kd.similarity import at_least_float32

FORMS = ("XYXY", "XYWH", "CXCYWH")  # of torchvision's boxes
SMALL = 8  # pixels: boxes of images no larger may well lie in the first one
RELATIVE = (
    "Expected boxes in pixels of images {size}, but every coordinate is at most 1, as of boxes in shares of the image "
    "(YOLO's). Multiply x by the width and y by the height first, and mind that YOLO gives centre and size."
)

Boxes = Sequence[Tensor | Sequence[Sequence[float]]]
LABELS = "Expected the labels of an image's boxes as whole numbers [n], but got"


class Present(NamedTuple):
    """The classes that images show: a row for every one of an image, so images of several classes have several.

    Attributes:
        images: which image a row is of, [M].
        classes: its class, [M].
        boxes: of all objects of this class in this image, M tensors [n, 4].
    """

    images: Tensor
    classes: Tensor
    boxes: list[Tensor]


def box_masks(boxes: Boxes, size: tuple[int, int]) -> Tensor:
    """Boxes as masks: the share of every pixel that lies in a box of its image.

    Args:
        boxes: of every image, [n, 4] as left, top, right, bottom in pixels, right and bottom excluded
            (torchvision's xyxy; its `BoundingBoxes` in any upright format). Parts outside of the image are left out.
        size: (H, W) of the images.

    Returns:
        [B, H, W] in [0, 1], float32 at least. Of several boxes on a pixel the one that covers most of it counts.

    Raises:
        ValueError: for boxes of another form, or that say they are of images of another size; for shares of the image
            in the place of pixels, which all lie in the first one.

    >>> box_masks([[[0, 0, 1.5, 1]], []], (2, 2))
    tensor([[[1.0000, 0.5000],
             [0.0000, 0.0000]],
    <BLANKLINE>
            [[0.0000, 0.0000],
             [0.0000, 0.0000]]])
    """
    if isinstance(boxes, Tensor):
        raise ValueError(f"Expected a list with the boxes [n, 4] of every image, but got {shape(boxes.shape)}.")
    _check_canvas(boxes, size)
    found = [_checked(some) for some in boxes]
    if min(size) > SMALL and any(map(len, found)) and all(bool((some <= 1).all()) for some in found):
        raise ValueError(RELATIVE.format(size=shape(size)))
    masks = [_mask(some, size) for some in found]
    return torch.stack(masks) if masks else torch.zeros(0, *size)


def _checked(boxes: Tensor | Sequence[Sequence[float]]) -> Tensor:
    """Boxes [n, 4] of one image, of a floating-point type.

    >>> _checked([[0, 0, 4, 4], [5, 5, 2, 2]])  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: Expected boxes as left, ... NaN: [5.0, 5.0, 2.0, 2.0] is the first of them. ...
    """
    found = torch.as_tensor(_as_corners(boxes))
    found = at_least_float32(found if found.is_floating_point() else found.float())
    if not found.numel():
        return found.view(0, 4)
    if found.ndim != 2 or found.shape[1] != 4:
        raise ValueError(f"Expected the boxes of an image as [n, 4], but got {shape(found.shape)}.")
    bad = ~(found[:, :2] <= found[:, 2:]).all(1)
    if bool(bad.any()):
        raise ValueError(
            "Expected boxes as left, top, right, bottom in pixels, but some end before they start, or are NaN: "
            f"{found[bad][0].tolist()} is the first of them. Convert others with torchvision.ops.box_convert."
        )
    return found


def _as_corners(boxes: Any) -> Any:
    """torchvision's boxes, which say what their numbers mean, as left, top, right, bottom; others as they are."""
    form = getattr(boxes, "format", None)
    if form is None or not isinstance(boxes, Tensor):
        return boxes
    if form.value not in FORMS:
        raise ValueError(f"Expected upright boxes, {', '.join(FORMS)}, but got {form.value}.")
    from torchvision.ops import box_convert  # who has such boxes has torchvision

    return box_convert(boxes.as_subclass(Tensor), form.value.lower(), "xyxy")


def _check_canvas(boxes: Boxes, size: tuple[int, int]) -> None:
    """Raise a ValueError for torchvision's boxes in pixels of images of another size."""
    for some in boxes:
        canvas = getattr(some, "canvas_size", size)
        if tuple(canvas) != tuple(size):
            raise ValueError(
                f"Expected boxes in pixels of images {shape(size)}, but they say they are of images {shape(canvas)}. "
                "Move them with their images: torchvision.transforms.v2.functional.resize."
            )


def _mask(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes [n, 4] -> [H, W]."""
    if not len(boxes):
        return boxes.new_zeros(size)
    down, across = (_covered(boxes[:, axis], boxes[:, axis + 2], size[1 - axis]) for axis in (1, 0))
    return (down[:, :, None] * across[:, None, :]).amax(0)


def _covered(low: Tensor, high: Tensor, length: int) -> Tensor:
    """Share of each of `length` pixels between low and high, [n] twice -> [n, length]."""
    start = torch.arange(length, dtype=low.dtype, device=low.device)
    return (torch.minimum(start + 1, high[:, None]) - torch.maximum(start, low[:, None])).clamp_min(0)


def by_class(boxes: Boxes, labels: Sequence[Tensor | Sequence[int]]) -> Present:
    """One row per image and class in it, as explanations are: one map for one class.

    Args:
        boxes: of every image, [n, 4].
        labels: class of every box, [n], for every image.

    Raises:
        ValueError: when there are not as many labels as boxes, or labels that are no numbers.

    >>> two = torch.tensor([[0., 0., 2., 2.], [1., 1., 3., 3.]])
    >>> present = by_class([two, two], [torch.tensor([7, 7]), torch.tensor([2, 5])])
    >>> present.images, present.classes, [len(boxes) for boxes in present.boxes]
    (tensor([0, 1, 1]), tensor([7, 2, 5]), [2, 1, 1])
    """
    objects, names = [_checked(some) for some in boxes], [_numbers(some) for some in labels]
    if [len(some) for some in objects] != [len(some) for some in names]:
        raise ValueError("Expected a label for every box of every image, but there are more of the one than the other.")
    rows = [
        (image, int(which), some[named == which])
        for image, (some, named) in enumerate(zip(objects, names, strict=True))
        for which in named.unique()
    ]
    device = names[0].device if names else None
    images, classes = (torch.tensor([row[k] for row in rows], dtype=torch.long, device=device) for k in (0, 1))
    return Present(images, classes, [row[2] for row in rows])


def _numbers(labels: Tensor | Sequence[int]) -> Tensor:
    """Labels [n] of one image's boxes."""
    try:
        found = torch.as_tensor(labels)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{LABELS} {labels!r}. Give every class a number.") from error
    if found.ndim != 1:
        raise ValueError(f"{LABELS} {shape(found.shape)}.")
    return found
