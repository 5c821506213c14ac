"""What each known image operation of torchvision and timm does to the place of pixels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from e2kd.frozen.geometry import Matrix, box, size_of

Size = tuple[int, int]  # (H, W)


class Drawn(NamedTuple):
    """How an operation's method was called while the operation ran, and what it returned."""

    args: tuple[Any, ...]
    result: Any


# Operation, what it drew, sizes of its input and its result -> unit square of the result to pixels of the input;
# None where no pixel moved.
Formula = Callable[[Any, Any, Size, Size], "Matrix | None"]


class Follow(NamedTuple):
    """How to follow an operation: the method to listen to, "" for none, and what that says of the geometry."""

    method: str
    formula: Formula
    erases: bool = False


def _crop_and_resize(operation: Any, drawn: Drawn, source: Size, out: Size) -> Matrix:
    top, left, height, width = _values(drawn, "top", "left", "height", "width")
    return box(left, top, width, height)


def _random_crop(operation: Any, drawn: Drawn, source: Size, out: Size) -> Matrix:
    if isinstance(drawn.result, dict):
        (left, top, *_), found = drawn.result["padding"], drawn.result
        return box(found["left"] - left, found["top"] - top, out[1], out[0])
    top, left = drawn.result[:2]  # in the padded image, which the method was given
    padded = size_of(drawn.args[0])
    x, y, x_end, y_end = _sides(operation.padding or 0)
    needed = padded[1] - source[1] - x - x_end, padded[0] - source[0] - y - y_end  # `pad_if_needed`, on both sides
    return box(left - x - needed[0] // 2, top - y - needed[1] // 2, out[1], out[0])


def _centre_crop(operation: Any, drawn: None, source: Size, out: Size) -> Matrix:
    top, left = (
        round((had - has) / 2) if had >= has else -((has - had) // 2) for had, has in zip(source, out, strict=True)
    )
    return box(left, top, out[1], out[0])


def _crop_or_pad(operation: Any, drawn: Drawn, source: Size, out: Size) -> Matrix:
    top, left = drawn.result
    return box(left, top, out[1], out[0])


def _trim(operation: Any, drawn: None, source: Size, out: Size) -> Matrix:
    start = min(operation.border_size, source[0])  # the height, for both
    return box(start, start, out[1], out[0])


def _pad(operation: Any, drawn: None, source: Size, out: Size) -> Matrix:
    left, top, *_ = _sides(operation.padding)
    return box(-left, -top, out[1], out[0])


def _random_pad(operation: Any, drawn: Drawn, source: Size, out: Size) -> Matrix:
    left, top, *_ = drawn.result["padding"] if isinstance(drawn.result, dict) else drawn.result
    return box(-left, -top, out[1], out[0])


def _mirror(operation: Any, drawn: None, source: Size, out: Size) -> Matrix:
    return box(source[1], 0, -source[1], source[0])


def _upside_down(operation: Any, drawn: None, source: Size, out: Size) -> Matrix:
    return box(0, source[0], source[1], -source[0])


def _rotation(operation: Any, drawn: Drawn, source: Size, out: Size) -> Matrix:
    angle = drawn.result["angle"] if isinstance(drawn.result, dict) else drawn.result
    return _turned(angle, operation.center, source, out)


def _turned(angle: float, centre: Sequence[float] | None, source: Size, out: Size) -> Matrix:
    return _affine(-angle, (0, 0), 1, (0, 0), centre, source, out)


def _random_affine(operation: Any, drawn: Drawn, source: Size, out: Size) -> Matrix:
    angle, shift, scale, shear = _values(drawn, "angle", "translate", "scale", "shear")
    return _affine(angle, shift, scale, shear, operation.center, source, out)


def _affine(
    angle: float,
    shift: Sequence[float],
    scale: float,
    shear: Sequence[float],
    centre: Sequence[float] | None,
    source: Size,
    out: Size,
) -> Matrix:
    """Torchvision's definition: shear along x, along y, turn (degrees, clockwise), scale, all about a centre; shift."""
    turn, x, y = (math.radians(value) for value in (angle, *shear))
    turned = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    sheared = np.array([[1, 0], [-math.tan(y), 1]]) @ np.array([[1, -math.tan(x)], [0, 1]])
    back = np.linalg.inv(scale * turned @ sheared)
    middle = np.array([source[1], source[0]]) / 2 if centre is None else np.asarray(centre, dtype=np.float64)
    grown = np.array([out[1] - source[1], out[0] - source[0]]) / 2  # `expand` grows the canvas on all sides
    matrix = np.eye(3)
    matrix[:2, :2], matrix[:2, 2] = back, middle - back @ (middle + grown + np.asarray(shift))
    return matrix @ box(0, 0, out[1], out[0])


def _perspective(operation: Any, drawn: Drawn, source: Size, out: Size) -> Matrix:
    found = drawn.result["coefficients"] if isinstance(drawn.result, dict) else _coefficients(*drawn.result)
    return np.array([*found, 1.0]).reshape(3, 3) @ box(0, 0, out[1], out[0])


def _coefficients(starts: Any, ends: Any) -> Matrix:
    """The homography that takes each end to its start."""
    rows = []
    for (u, v), (x, y) in zip(starts, ends, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
    return np.linalg.solve(np.array(rows, dtype=np.float64), np.ravel(starts).astype(np.float64))


def _policy(operation: Any, drawn: Drawn, source: Size, out: Size) -> Matrix | None:
    """One operation of a torchvision.transforms.v2 policy."""
    name, size = drawn.args[1], float(drawn.args[2])
    shear = math.degrees(math.atan(size))
    if name == "Rotate":
        return _turned(size, None, source, out)
    if name in ("ShearX", "ShearY"):
        return _affine(0, (0, 0), 1, (shear, 0) if name == "ShearX" else (0, shear), (0, 0), source, out)
    if name in ("TranslateX", "TranslateY"):
        shift = (int(size), 0) if name == "TranslateX" else (0, int(size))
        return _affine(0, shift, 1, (0, 0), None, source, out)
    return None


def _timm_policy(operation: Any, drawn: Drawn, source: Size, out: Size) -> Matrix | None:
    """One operation of a timm policy."""
    name = operation.name
    if name == "Rotate":
        return _turned(drawn.args[1], None, source, out)
    if not name.startswith(("Shear", "Translate")):
        return None
    matrix, axis = np.eye(3), 0 if "X" in name else 1
    relative = (source[1], source[0])[axis] if name.endswith("Rel") else 1
    matrix[axis, 1 - axis if name.startswith("Shear") else 2] = drawn.args[1] * relative
    return matrix @ box(0, 0, out[1], out[0])


def _erased(operation: Any, drawn: Drawn, source: Size, out: Size) -> Matrix | None:
    top, left, height, width = list(drawn.result.values() if isinstance(drawn.result, dict) else drawn.result)[:4]
    nothing = (height, width) == source or not height or not width  # a draw that failed erases nothing
    return None if nothing else box(left, top, width, height)


def _values(drawn: Drawn, *names: str) -> tuple[Any, ...]:
    return tuple(drawn.result[name] for name in names) if isinstance(drawn.result, dict) else tuple(drawn.result)


def _sides(padding: Any) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a padding as torchvision takes it."""
    values = [padding] if isinstance(padding, int) else list(padding)
    left, top, right, bottom = values * (4 // len(values))
    return left, top, right, bottom


DRAWS = "make_params"  # or `get_params`, before torchvision's v2
POLICY = "_apply_image_or_video_transform"
FOLLOWED: dict[str, Follow] = {
    "torchvision.CenterCrop": Follow("", _centre_crop),
    "torchvision.Pad": Follow("", _pad),
    "torchvision.RandomAffine": Follow(DRAWS, _random_affine),
    "torchvision.RandomCrop": Follow(DRAWS, _random_crop),
    "torchvision.RandomErasing": Follow(DRAWS, _erased, erases=True),
    "torchvision.RandomHorizontalFlip": Follow("", _mirror),
    "torchvision.RandomPerspective": Follow(DRAWS, _perspective),
    "torchvision.RandomResizedCrop": Follow(DRAWS, _crop_and_resize),
    "torchvision.RandomRotation": Follow(DRAWS, _rotation),
    "torchvision.RandomVerticalFlip": Follow("", _upside_down),
    "torchvision.RandomZoomOut": Follow(DRAWS, _random_pad),
    "torchvision.AutoAugment": Follow(POLICY, _policy),
    "torchvision.RandAugment": Follow(POLICY, _policy),
    "torchvision.TrivialAugmentWide": Follow(POLICY, _policy),
    "timm.AugmentOp": Follow("aug_fn", _timm_policy),
    "timm.CenterCropOrPad": Follow("", _centre_crop),
    "timm.RandomCropOrPad": Follow(DRAWS, _crop_or_pad),
    "timm.RandomPad": Follow(DRAWS, _random_pad),
    "timm.RandomResizedCropAndInterpolation": Follow(DRAWS, _crop_and_resize),
    "timm.TrimBorder": Follow("", _trim),
}
