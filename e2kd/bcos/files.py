"""Reading the tensors of checkpoint files, without unpickling anything."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint

NESTED = ("state_dict", "model_state_dict", "model")  # where training checkpoints keep the tensors
WRAPPERS = ("model.", "module.", "_orig_mod.")  # Lightning, DistributedDataParallel, torch.compile
EMA = "ema.module."


def read_network(path: str | Path, *, ema: bool = False) -> dict[str, Tensor]:
    """The tensors of one network by its own keys, from a released file or a training checkpoint.

    Args:
        path: `.safetensors`, or what `torch.save` wrote.
        ema: the averaged weights of a training checkpoint in place of the last ones.

    Raises:
        ValueError: for a file with objects other than tensors and plain values, or without the weights asked for.
    """
    tensors = _tensors(Path(path))
    averaged = {key.removeprefix(EMA): value for key, value in tensors.items() if key.startswith(EMA)}
    if ema and not averaged:
        raise ValueError(f"Expected averaged weights `{EMA}*` in {path}, but it has none; load it with ema=False.")
    found = _unwrapped(averaged if ema else {k: v for k, v in tensors.items() if not k.startswith("ema.")})
    if not found:
        raise ValueError(f"Expected a network's tensors in {path}, but found {_held(tensors, averaged)}.")
    return found


def _held(tensors: dict[str, Tensor], averaged: dict[str, Tensor]) -> str:
    return "averaged weights alone; load them with ema=True" if averaged else f"{len(tensors)} tensors"


def _tensors(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    content = _safely_loaded(path)
    for name in NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not isinstance(content, Mapping):
        raise ValueError(f"Expected a state_dict in {path}, but found a {type(content).__name__}.")
    return {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}


def _safely_loaded(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds {_objects(path)}, and loading those could run any code, so e2kd does not. Where you trust "
            "the file, keep its tensors alone: "
            '`torch.save(torch.load(path, weights_only=False)["state_dict"], "stripped.pth")`.'
        ) from error


def _objects(path: Path) -> str:
    try:
        names = get_unsafe_globals_in_checkpoint(path)
    except (ValueError, RuntimeError, pickle.UnpicklingError):  # not of today's format
        names = []
    return f"objects of {', '.join(sorted(names))}" if names else "objects other than tensors"


def _unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefixes of wrappers; of a training checkpoint the model alone, not its teacher and metrics."""
    for wrapper in WRAPPERS:
        inside = {key.removeprefix(wrapper): value for key, value in tensors.items() if key.startswith(wrapper)}
        tensors = inside or tensors
    if tensors and all(key.startswith("0.") for key in tensors) and not any("transformer" in key for key in tensors):
        return {key.removeprefix("0."): value for key, value in tensors.items()}
    return tensors
