"""An image transform that also says where it moved every pixel, drawing and returning just what it did before."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from torch import nn

from e2kd.frozen.geometry import Step, box, in_units, inverse, size_of
from e2kd.frozen.operations import DRAWS, FOLLOWED, POLICY, Drawn, Follow
from e2kd.frozen.ramps import check_followed

Operation = Callable[[Any], Any]

# What changes how pixels look, or how many there are, but not which part of the image they show.
IN_PLACE = {
    "torchvision": {
        "ColorJitter", "ConvertImageDtype", "GaussianBlur", "GaussianNoise", "Grayscale", "Identity", "JPEG",
        "Normalize", "PILToTensor", "RGB", "RandomAdjustSharpness", "RandomAutocontrast", "RandomChannelPermutation",
        "RandomEqualize", "RandomGrayscale", "RandomInvert", "RandomPhotometricDistort", "RandomPosterize",
        "RandomResize", "RandomShortestSize", "RandomSolarize", "Resize", "ScaleJitter", "ToDtype", "ToImage",
        "ToPILImage", "ToPureTensor", "ToTensor",
    },
    "timm": {"MaybePILToTensor", "MaybeToTensor", "ResizeKeepRatio", "ToNumpy", "ToTensor"},
}  # fmt: skip
# Where those that run others keep them.
CONTAINERS = {
    "torchvision.Compose": "transforms",
    "torchvision.RandomApply": "transforms",
    "torchvision.RandomChoice": "transforms",
    "torchvision.RandomOrder": "transforms",
    "timm.AutoAugment": "policy",
    "timm.RandAugment": "ops",
}
REFUSED = {
    "torchvision.ElasticTransform": "its displacements are no homography. JointAugmentation(RandomElasticTransform()) "
    "of Kornia moves image and map together.",
    "torchvision.FiveCrop": "it makes several images of one. Take RandomCrop.",
    "torchvision.TenCrop": "it makes several images of one. Take RandomCrop and RandomHorizontalFlip.",
    "torchvision.AugMix": "it blends images that were moved differently. Take RandAugment.",
    "timm.AugMixAugment": "it blends images that were moved differently. Take RandAugment, 'rand-m9-mstd0.5-inc1'.",
}
UNKNOWN = (
    "where it moves pixels is not known. If it changes how pixels look but not where they are, say so with "
    "e2kd.frozen.AppearanceOnly({name}). If not, leave it out, or augment batches with JointAugmentation."
)
OLD_POLICY = "what it draws can't be seen. Take torchvision.transforms.v2.{name}, which draws from the same policy."

TRIALS = 3  # runs of an operation that are checked

_steps: ContextVar[list[Step]] = ContextVar("steps")


class AppearanceOnly:
    """An operation that changes how pixels look but not where they are: you vouch for it.

    >>> AppearanceOnly(lambda image: image / 2)
    AppearanceOnly(<lambda>)
    """

    def __init__(self, operation: Operation) -> None:
        self.operation = operation

    def __call__(self, image: Any) -> Any:
        result = self.operation(image)
        if size_of(result) != size_of(image):
            raise ValueError(
                f"{self} was said to keep every pixel in its place, but it made an image of (H, W) = {size_of(result)} "
                f"from one of {size_of(image)}."
            )
        return result

    def __repr__(self) -> str:
        return f"AppearanceOnly({getattr(self.operation, '__name__', self.operation)})"


class Recorder:
    """A transform of images, and where it moved their pixels.

    Image and random numbers are those of the bare transform: the same objects run, and the parameters that
    they draw are listened to while they run. Each operation that moves pixels is tried on an image of coordinates when
    it first runs.

    Args:
        transform: operations of `torchvision.transforms`, its v2, or timm; containers and lists of them.

    Raises:
        ValueError: for an operation that can't be followed; says which, why, and what to do.

    >>> import torch
    >>> from torchvision.transforms import v2
    >>> image, steps = Recorder(v2.CenterCrop(2))(torch.arange(16).reshape(1, 4, 4))
    >>> image.tolist(), steps[0].back.tolist()
    ([[[5, 6], [9, 10]]], [[0.5, 0.0, 0.25], [0.0, 0.5, 0.25], [0.0, 0.0, 1.0]])
    """

    def __init__(self, transform: Any) -> None:
        self.recorded = _recorded(transform)

    def __call__(self, image: Any) -> tuple[Any, list[Step]]:
        """An original image -> the augmented one, and what was done to it."""
        token = _steps.set([])
        try:
            return self.recorded(image), _steps.get()
        finally:
            _steps.reset(token)


class _Chain(list[Operation]):
    """Operations one after the other; a list to the container that they came from."""

    def __call__(self, image: Any) -> Any:
        for operation in self:
            image = operation(image)
        return image


class _Followed:
    """An operation that writes down what it did."""

    def __init__(self, operation: Any, follow: Follow) -> None:
        self.operation, self.follow = operation, follow
        self.method = follow.method
        if self.method == DRAWS and not hasattr(operation, DRAWS):
            self.method = "get_params"
        self.unproven = 0 if follow.erases or self.method == POLICY else TRIALS

    def __call__(self, image: Any) -> Any:
        if self.unproven:
            check_followed(self.run, image, repr(self.operation))
            self.unproven -= 1
        result, steps = self.run(image)
        _steps.get().extend(steps)
        return result

    def run(self, image: Any) -> tuple[Any, list[Step]]:
        """The result, and how it lies in the image."""
        operation, calls = _listening(self.operation, self.method)
        source, result = size_of(image), operation(image)
        if result is image and not self.follow.erases:
            return result, []
        matrices = (self.follow.formula(self.operation, call, source, size_of(result)) for call in calls)
        found = [in_units(matrix, source) for matrix in matrices if matrix is not None]
        erases = self.follow.erases
        return result, [Step(inverse(back) if erases else back, erases) for back in found]


class _TimmErasing:
    """timm's RandomErasing, which draws its boxes and writes them in one go: its writes are seen."""

    def __init__(self, operation: Any) -> None:
        self.operation = operation

    def __call__(self, image: Any) -> Any:
        self.operation(_Slate(image))
        return image


class _Slate:
    """An image that writes down where it is written to."""

    def __init__(self, image: Any) -> None:
        self.image, self.size, self.dtype = image, image.size, image.dtype

    def __setitem__(self, where: Any, values: Any) -> None:
        self.image[where] = values
        rows, columns = where[1:]
        height, width = rows.stop - rows.start, columns.stop - columns.start
        if not height or not width:
            return
        erased = box(columns.start, rows.start, width, height)
        _steps.get().append(Step(inverse(in_units(erased, size_of(self.image))), erases=True))


def _recorded(operation: Any) -> Any:
    """The operation itself where it moves nothing; else one that does the same and writes down what it did."""
    if isinstance(operation, (list, tuple, nn.Sequential, nn.ModuleList)):
        return _Chain(_recorded(child) for child in operation)
    library, kind = type(operation).__module__.split(".")[0], type(operation).__name__
    name = f"{library}.{kind}"
    if isinstance(operation, AppearanceOnly) or kind in IN_PLACE.get(library, ()):
        return operation
    if name in CONTAINERS:
        container = copy.copy(operation)
        container.__dict__[CONTAINERS[name]] = _recorded(getattr(operation, CONTAINERS[name]))
        return container
    if name == "timm.RandomErasing":
        return _TimmErasing(operation)
    follow = FOLLOWED.get(name)
    if follow is not None and (follow.method != POLICY or hasattr(operation, POLICY)):
        return _Followed(operation, follow)
    reason = REFUSED.get(name, UNKNOWN if follow is None else OLD_POLICY)
    shown = getattr(operation, "__name__", kind)
    raise ValueError(f"FrozenDataset can't follow {shown}: {reason.format(name=shown)}")


def _listening(operation: Any, method: str) -> tuple[Any, list[Any]]:
    """A copy of the operation, and a list of a method's calls while it runs; [None] where there is no such method."""
    if not method:
        return operation, [None]
    calls: list[Any] = []
    heard, ask = copy.copy(operation), getattr(operation, method)

    def asked(*args: Any, **kwargs: Any) -> Any:
        result = ask(*args, **kwargs)
        calls.append(Drawn(args, result))
        return result

    heard.__dict__[method] = asked
    return heard, calls
