"""Settings as the `repr` of a module shows them."""

from __future__ import annotations

from dataclasses import fields, is_dataclass

from torch import Tensor, nn

from e2kd.errors import shape


def shown(**settings: object) -> str:
    """Settings for `extra_repr`, in the order they are given; torch itself shows those that are modules.

    Of a tensor its shape alone is told: its values would wait for the device.

    >>> shown(weight=1.0, size=None, loss=nn.functional.relu, criterion=nn.ReLU())
    'weight=1.0, size=None, loss=relu'
    """
    return ", ".join(f"{name}={_said(value)}" for name, value in settings.items() if not isinstance(value, nn.Module))


def _said(value: object) -> str:
    """A setting in a few words, whatever it is.

    >>> import torch
    >>> _said("all"), _said((0, 10)), _said(torch.ones(2, 3)), _said(object())
    ("'all'", '(0, 10)', 'tensor [2, 3]', 'object')
    """
    if value is None or isinstance(value, (str, int, float)):
        return repr(value)
    if isinstance(value, Tensor):
        return f"tensor {shape(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(_said, value))})"
    name: str = getattr(value, "__name__", type(value).__name__)
    if is_dataclass(value) and not isinstance(value, type):  # explainers
        return f"{name}({shown(**{field.name: getattr(value, field.name) for field in fields(value) if field.repr})})"
    return name
