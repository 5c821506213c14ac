"""Loading official B-cos checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from e2kd.bcos.blocks import Layer
from e2kd.bcos.files import read_network
from e2kd.bcos.recognition import recognised
from e2kd.errors import shape


def load_official(
    path: str | Path, *, ema: bool = False, b: float = 2, norm: Layer | None = None, logit_bias: float | None = None
) -> nn.Module:
    """An official B-cos network from its file, in eval mode: B-cos-v2 releases and training checkpoints.

    Which network it is, with its sizes, classes, max-out and kind of norm, is read from the keys and shapes. What
    no file says is what all released networks have: b = 2 and the logit bias -log(classes - 1). Nothing is unpickled
    and nothing is downloaded. The network takes images encoded by `AddInverse`.

    Args:
        path: `.safetensors`, or what `torch.save` or Lightning wrote.
        ema: the averaged weights of a training checkpoint.
        b: for networks trained with another.
        norm: for CNNs trained with another norm that has the same keys; made with the number of channels.
        logit_bias: for networks trained with another; -log(classes - 1) if None.

    Raises:
        ValueError: for a file that holds something else; the message says what.

    >>> from tempfile import TemporaryDirectory
    >>> from e2kd.bcos import resnet20
    >>> with TemporaryDirectory() as folder:
    ...     torch.save(resnet20().state_dict(), f"{folder}/resnet20.pth")
    ...     model = load_official(f"{folder}/resnet20.pth")
    >>> type(model).__name__, model.training, model(torch.rand(1, 6, 32, 32)).shape
    ('BcosResNet', False, torch.Size([1, 10]))
    """
    state = read_network(path, ema=ema)
    build = recognised(state)
    options: dict[str, Any] = {"b": b, "logit_bias": logit_bias}
    if norm is not None:
        options["norm"] = norm
    with torch.device("meta"):
        model = build(**options)
    _check(state, model, path)
    model.load_state_dict(state, assign=True)
    return model.eval()


def _check(state: dict[str, Tensor], model: nn.Module, path: str | Path) -> None:
    """Raise unless all entries have a place in the network and fill it."""
    own = model.state_dict()
    faults = {
        "missing": [key for key in own if key not in state],
        "without a place": [key for key in state if key not in own],
        "of another shape": [
            f"{key} {shape(state[key].shape)} in place of {shape(own[key].shape)}"
            for key in own
            if key in state and state[key].shape != own[key].shape
        ],
    }
    if any(faults.values()):
        told = "; ".join(_listed(name, keys) for name, keys in faults.items() if keys)
        raise ValueError(f"{path} does not fit the {type(model).__name__} that its keys and shapes tell. {told}.")


def _listed(name: str, keys: list[str], most: int = 5) -> str:
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return f"{len(keys)} {name}: {', '.join(keys[:most])}{more}"
