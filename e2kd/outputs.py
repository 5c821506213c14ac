"""Logits out of whatever a classifier returns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from e2kd.errors import shape


def logits_of(outputs: Any) -> Tensor:
    """The logits [B, K] in a tensor, tuple, dict or Hugging Face ModelOutput.

    A dict or ModelOutput gives its "logits" (or its only tensor [B, K]); a tuple its first tensor [B, K].

    Raises:
        TypeError: when there are none; the message says what came.

    >>> import torch
    >>> logits_of({"loss": None, "logits": torch.zeros(2, 5)}).shape
    torch.Size([2, 5])
    """
    found = _find(outputs)
    if found is None:
        raise TypeError(
            "Expected logits [B, K] as a tensor, or a tuple, dict or ModelOutput holding them, but got "
            f"{_say(outputs)}. "
            "Pass the classifier's output as it came from the model."
        )
    return found


def top_classes(logits: Tensor) -> Tensor:
    """The top classes [B] of logits [B, K], float64; NaN where some are NaN, of which argmax would say that they come
    first.

    >>> import torch
    >>> top_classes(torch.tensor([[0., 1.], [torch.nan, 0.]]))
    tensor([1., nan], dtype=torch.float64)
    """
    return torch.where(logits.isnan().any(1), torch.nan, logits.argmax(1).double())


def equal(first: Tensor, second: Tensor) -> Tensor:
    """1 where classes [B] are the same, else 0, float64; NaN where either is."""
    second = second.to(first.device)
    return torch.where((first + second).isnan(), torch.nan, (first == second).double())


def _find(outputs: Any) -> Tensor | None:
    if isinstance(outputs, Tensor):
        return outputs if outputs.ndim == 2 else None
    if isinstance(named := getattr(outputs, "logits", None), Tensor):
        return _find(named)
    if isinstance(outputs, dict):
        if "logits" in outputs:
            return _find(outputs["logits"])
        outputs = tuple(outputs.values())
    if isinstance(outputs, (tuple, list)):
        return next((x for x in outputs if isinstance(x, Tensor) and x.ndim == 2), None)
    return None


def _say(outputs: Any) -> str:
    if isinstance(outputs, Tensor):
        return f"a tensor {shape(outputs.shape)}"
    if isinstance(outputs, dict):
        return f"a {type(outputs).__name__} with {', '.join(map(str, outputs)) or 'nothing'}"
    return f"a {type(outputs).__name__}"


def first_tensor(value: Any) -> Tensor | None:
    """The first tensor in a tensor, tuple, list or dict.

    >>> first_tensor((None, [2])) is None
    True
    """
    if isinstance(value, Tensor):
        return value
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        for item in value:  # no next(..., None), which torch.compile does not take in torch 2.6
            if (found := first_tensor(item)) is not None:
                return found
    return None


def images_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The images [B, C, H, W] among the arguments of a model's call."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.ndim == 4:
            return value
    return None
