"""Logits and maps as they are stored, and as they are read back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]
Floats = NDArray[np.float32]

# How a map is stored, and which stored number stands for its scale.
MAP_TYPES = {"float16": ("<f2", 1), "int8": ("|i1", 127), "uint8": ("|u1", 255)}
LARGEST_FLOAT16 = 65504.0


def finite(values: Tensor, name: str) -> Floats:
    """Values [B, ...] as an array; a ValueError names the first row with NaN or infinity."""
    array: Floats = values.detach().to("cpu", torch.float32).numpy()
    bad = ~np.isfinite(array).reshape(len(array), -1).all(1)
    _refuse(bad, f"finite {name}", "NaN or infinity", "Look at the teacher's outputs for that image.")
    return array


def _refuse(bad: Any, wanted: str, found: str, advice: str) -> None:
    if bad.any():
        raise ValueError(f"Expected {wanted}, but row {bad.argmax()} of these {len(bad)} has {found}. {advice}")


def stored_logits(logits: Floats, top: int | None) -> dict[str, Array]:
    """Logits [B, K]: all, or the `top` largest in falling order, equal ones by class, and the others' logsumexp.

    Raises:
        ValueError: for logits that float16 can't hold; it names the first row.
    """
    _refuse(
        np.abs(logits).max(1) > LARGEST_FLOAT16,
        f"logits within ±{LARGEST_FLOAT16:,.0f}, the largest float16",
        "larger ones",
        "Are they the logits of a classifier? Then scale them down in the teacher's forward.",
    )
    if top is None:
        return {"logits": logits}
    order = _ranking(logits)
    ranked = np.take_along_axis(logits, order, 1)
    peak = ranked[:, top]
    rest = peak + np.log(np.exp(ranked[:, top:] - peak[:, None]).sum(1, dtype=np.float64))
    return {"top_logits": ranked[:, :top], "top_classes": order[:, :top], "rest": rest}


def _ranking(logits: Floats) -> NDArray[np.int64]:
    """Classes in falling order of their logits, equal ones by number, on every machine the same."""
    bits = (logits + 0.0).view(np.int32)  # + 0.0: no negative zero
    falling = ~(bits ^ ((bits >> 31) & 0x7FFFFFFF)).astype(np.int64)  # whole numbers in the order of the floats
    # Sorting keys with the class in their low half is four times as fast as a stable argsort.
    return np.sort(falling << 32 | np.arange(logits.shape[1]), axis=1) & 0xFFFFFFFF


def read_logits(stored: Mapping[str, Array], classes: int, top: int | None) -> Tensor:
    """Logits [B, K] float32; those not stored share their probability evenly."""
    if top is None:
        return torch.from_numpy(stored["logits"]).float()
    others = torch.from_numpy(stored["rest"]) - math.log(classes - top)
    where = torch.from_numpy(stored["top_classes"].astype(np.int64))
    return others[:, None].repeat(1, classes).scatter_(1, where, torch.from_numpy(stored["top_logits"]).float())


def stored_maps(maps: Floats, map_type: str, count: int) -> dict[str, Array]:
    """Maps [B, n * C, h, w] relative to their scales [B], or [B, n] of n maps each.

    The scale is 0 for a map that is zero everywhere, and only then.

    Raises:
        ValueError: for negative maps as uint8; it names the first row.
    """
    kind, unit = MAP_TYPES[map_type]
    if kind == "|u1":
        bad = (maps < 0).reshape(len(maps), -1).any(1)
        _refuse(bad, "maps >= 0 to store as uint8", "negative values", 'Use map_type="int8".')
    apart = maps.reshape(len(maps), count, -1)
    scales = np.abs(apart).max(2)
    if kind == "<f2":  # a power of two: it costs no precision
        scales = np.where(scales > 0, np.ldexp(np.float32(1), np.frexp(scales)[1] - 1), 0)
    relative = (apart / np.where(scales > 0, scales, 1)[:, :, None]).reshape(maps.shape)
    found = {"scales": scales if count > 1 else scales[:, 0]}
    return found | {"maps": relative if kind == "<f2" else np.rint(relative * unit)}


def read_maps(stored: Mapping[str, Array], map_type: str) -> Tensor:
    """Maps [B, n * C, h, w] float32."""
    relative = torch.from_numpy(stored["maps"]).float().div_(MAP_TYPES[map_type][1])
    found = torch.from_numpy(stored["scales"])
    scales = (found if found.ndim == 2 else found[:, None])[:, :, None]
    each = (scales.shape[1], math.prod(relative.shape[1:]) // scales.shape[1])
    return relative.view(len(relative), *each).mul_(scales).view(relative.shape)
