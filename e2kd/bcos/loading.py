"""Loading official B-cos checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from e2kd.bcos.blocks import Layer
from e2kd.bcos.files import read_network
from e2kd.bcos.recognition import recognised
from e2kd.errors import shape, warn_user

CONVERTED = "model."  # before the keys of networks that B-cosification made: they hold the standard one as `model`


def load_official(
    path: str | Path,
    *,
    ema: bool = False,
    b: float = 2,
    norm: Layer | None = None,
    logit_bias: float | None = None,
    into: nn.Module | None = None,
) -> nn.Module:
    """An official B-cos network from its file, in eval mode: B-cos-v2 releases and training checkpoints.

    Which network it is, with its sizes, classes, max-out and kind of norm, is read from the keys and shapes. What
    no file says is what all released networks have: b = 2 and the logit bias -log(classes - 1). Nothing is unpickled
    and nothing is downloaded. The network takes images encoded by `AddInverse`.

    B-cosified CNNs have the same keys but other layers: weights that are not brought to norm 1, and activations. Make
    such a network by `bcosify(timm.create_model("resnet50"))` and pass it as `into`. Their training checkpoints are
    known by a prefix; if only the means in their batch norms hint at it, there is a warning: pass `norm` to end it.

    Args:
        path: `.safetensors`, or what `torch.save` or Lightning wrote.
        ema: the averaged weights of a training checkpoint.
        b: for networks trained with another.
        norm: for CNNs trained with another norm that has the same keys; made with the number of channels.
        logit_bias: for networks trained with another; -log(classes - 1) if None.
        into: the network that takes the file's weights, with settings of its own. Where its keys are others, but
            the entries come in the same order, with the same last names and shapes, they are taken by their order,
            as those of B-cosified DenseNets.

    Raises:
        ValueError: for a file that holds something else, or a B-cosified network without `into`; the message says
            what.

    >>> from tempfile import TemporaryDirectory
    >>> from e2kd.bcos import resnet20
    >>> with TemporaryDirectory() as folder:
    ...     torch.save(resnet20().state_dict(), f"{folder}/resnet20.pth")
    ...     model = load_official(f"{folder}/resnet20.pth")
    >>> type(model).__name__, model.training, model(torch.rand(1, 6, 32, 32)).shape
    ('BcosResNet', False, torch.Size([1, 10]))
    """
    found = read_network(path, ema=ema)
    state = {key.removeprefix(CONVERTED): value for key, value in found.items()}
    if into is not None:
        if b != 2 or norm is not None or logit_bias is not None:
            raise ValueError("Expected no b, norm or logit_bias beside `into`: that network has settings of its own.")
        state = _in_order(state, into.state_dict())
        _check(state, into, path, f"{type(into).__name__} that was given")
        into.load_state_dict(state)
        return into.eval()
    _check_origin(state, path, converted=state.keys() != found.keys(), norm=norm)
    build = recognised(state)
    options: dict[str, Any] = {"b": b, "logit_bias": logit_bias}
    if norm is not None:
        options["norm"] = norm
    with torch.device("meta"):
        model = build(**options)
    _check(state, model, path, f"{type(model).__name__} that its keys and shapes tell")
    model.load_state_dict(state, assign=True)
    return model.eval()


def _in_order(state: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """The entries by the keys of a network, if they are the same ones but for their names."""
    kinds = [[(key.split(".")[-1], value.shape) for key, value in entries.items()] for entries in (state, own)]
    same = state.keys() != own.keys() and kinds[0] == kinds[1]
    return dict(zip(own, state.values(), strict=True)) if same else state


def _check_origin(state: dict[str, Tensor], path: str | Path, *, converted: bool, norm: Layer | None) -> None:
    """Raise for B-cosified networks, and warn of what may be one.

    Uncentred batch norms never change their `running_mean`: one that is not 0 comes from a standard network, if from
    training at all.
    """
    make = 'Make the network, as by `bcosify(timm.create_model("resnet50"))`, and pass it as `into`.'
    if converted:
        vit = "to_patch_embedding.linear.linear.weight" in state
        advice = "e2kd has no such network for its simple ViT." if vit else make
        raise ValueError(
            f"{path} is of a network that was made from a standard one. It uses its weights as they are and has "
            f"activations, unlike other B-cos networks with these keys. {advice}"
        )
    if norm is None and any(key.endswith("running_mean") and value.any() for key, value in state.items()):
        warn_user(
            f"The batch norms of {path} hold means, which networks that were B-cos from the start don't use. Was it "
            f"made from a standard network? Then this is not it. {make} If it is what you want, name its `norm`.",
            UserWarning,
        )


def _check(state: dict[str, Tensor], model: nn.Module, path: str | Path, whose: str) -> None:
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
        told = "; ".join(listed(name, keys) for name, keys in faults.items() if keys)
        raise ValueError(f"{path} does not fit the {whose}. {told}.")


def listed(name: str, keys: list[str], most: int = 5) -> str:
    """How many there are, of what, and the first of them.

    >>> listed("missing", ["a", "b", "c"], most=2)
    '3 missing: a, b and 1 more'
    """
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return f"{len(keys)} {name}: {', '.join(keys[:most])}{more}"
