"""Contexts that borrow a model and give it back as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import FunctionType
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DataParallel, DistributedDataParallel

from e2kd.held import holding_statistics
from e2kd.kernels import math_kernel
from e2kd.sharding import is_sharded


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, DataParallel and torch.compile wrappers."""
    while True:
        if isinstance(model, (DistributedDataParallel, DataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def timm_configuration(model: nn.Module) -> dict[str, Any]:
    """What a timm model knows of its images, weights and name; empty for other models.

    >>> timm_configuration(nn.Linear(2, 2))
    {}
    """
    found = getattr(model, "pretrained_cfg", None)
    return found if isinstance(found, dict) else {}


def dtype_of(module: nn.Module) -> torch.dtype:
    """The type a module computes in: that of its first floating-point parameter."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.get_default_dtype())


def as_computed(model: nn.Module, images: Tensor) -> Tensor:
    """Images in the type a model computes in; integers as they are, since such a model makes floats of them itself.

    >>> as_computed(nn.Linear(2, 2), torch.zeros(2, dtype=torch.float64)).dtype
    torch.float32
    >>> as_computed(nn.Linear(2, 2), torch.zeros(2, dtype=torch.uint8)).dtype
    torch.uint8
    """
    return images.to(dtype_of(model)) if images.is_floating_point() else images


def device_of(module: nn.Module, other: torch.device) -> torch.device:
    """Where a module's parameters are; `other` if it has none."""
    return next((p.device for p in module.parameters()), other)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; every module's own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def as_written(model: nn.Module) -> Iterator[None]:
    """Modules run as their authors wrote them: not compiled, no activation checkpointing, no autocast put around.

    A compiled part has no second derivative and can't be traced; a checkpointed one is recomputed outside of the
    contexts of its first run. Knows torch.compile in all its forms, torch's checkpoint_wrapper and the flags of timm
    and Hugging Face models.
    """
    changes = [(vars(m), name, value) for m in model.modules() for name, value in _written(m).items()]
    before = [space[name] for space, name, _ in changes]
    for space, name, value in changes:
        space[name] = value
    try:
        yield
    finally:
        for (space, name, _), value in zip(changes, before, strict=True):
            space[name] = value


def _written(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module that stand between a caller and its code, with what to put in their place."""
    own, found = vars(module), dict[str, Any]()
    if own.get("_compiled_call_impl") is not None:
        found["_compiled_call_impl"] = None
    if callable(own.get("checkpoint_fn")):
        found["checkpoint_fn"] = _call
    found |= {name: False for name in ("grad_checkpointing", "gradient_checkpointing") if own.get(name) is True}
    for name, value in own.items():
        if isinstance(value, FunctionType) and callable(original := getattr(value, "_torchdynamo_orig_callable", None)):
            found[name] = original
    if "forward" in own:
        if callable(original := own.get("_original_forward")):
            found["forward"] = original  # Accelerate's mixed precision
        if isinstance(inner := own["_modules"].get("_orig_mod"), nn.Module):
            found["forward"] = inner.__call__
    return found


def _call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


@contextmanager
def kept_statistics(model: nn.Module) -> Iterator[None]:
    """BatchNorm normalises as before but does not update its running statistics."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


@contextmanager
def kept_buffers(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Buffers are afterwards as they were, whatever observers, power iterations or running means did inside.

    But those of BatchNorm, which `kept_statistics` spares.
    """
    owners = {id(m): m for m in modules if not isinstance(m, _BatchNorm)}.values()
    kept = [(m, name, b, b.clone()) for m in owners for name, b in m._buffers.items() if _can_change(b)]
    try:
        yield
    finally:
        for owner, name, buffer, value in kept:
            owner._buffers[name] = buffer
            if buffer.shape != value.shape:  # observers change that too
                buffer.resize_(value.shape)
            buffer.data.copy_(value)  # by data, so that a graph that holds it stays valid


def _can_change(buffer: Tensor | None) -> TypeGuard[Tensor]:
    return buffer is not None and not buffer.is_inference() and not is_sharded(buffer)


@contextmanager
def untrained(model: nn.Module) -> Iterator[None]:
    """No parameter requires a gradient inside, so that a graph keeps what its inputs need alone.

    Shards of fully_shard stay as they are: what it gathers for the first time inside would never be trained.
    """
    trained = [p for p in model.parameters() if p.requires_grad and not is_sharded(p)]
    for p in trained:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trained:
            p.requires_grad_()


def is_compiled(model: nn.Module) -> bool:
    """Whether any module in a model runs compiled.

    >>> is_compiled(nn.Linear(2, 2))
    False
    """
    return any(
        own.get("_compiled_call_impl") is not None
        or "_orig_mod" in own.get("_modules", {})
        or any(isinstance(v, FunctionType) and hasattr(v, "_torchdynamo_orig_callable") for v in own.values())
        for own in map(vars, model.modules())
    )


def rng_state(device: torch.device) -> list[Tensor]:
    """The random generators a model on `device` draws from: the CPU's and the device's own."""
    states = [torch.get_rng_state()]
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state(device))
    return states


def set_rng_state(states: list[Tensor], device: torch.device) -> None:
    """Put back what `rng_state` returned."""
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.get_device_module(device).set_rng_state(states[1], device)


@contextmanager
def undrawn(device: torch.device) -> Iterator[None]:
    """The random generators are afterwards as they were, whatever is drawn inside."""
    states = rng_state(device)
    try:
        yield
    finally:
        set_rng_state(states, device)


@contextmanager
def replaying(model: nn.Module, device: torch.device, states: list[Tensor] | None) -> Iterator[None]:
    """What a second run of a part of a model needs to give the same numbers and a double backward.

    Full precision, the math kernel of attention (the fused ones have no second derivative),
    the random numbers of the first run if given, and BatchNorm statistics counted once and held fixed.
    """
    outer = rng_state(device) if states is not None else None
    with ExitStack() as stack:
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(math_kernel())
        stack.enter_context(kept_statistics(model))
        stack.enter_context(holding_statistics(model))
        stack.enter_context(as_written(model))
        if states is not None:
            set_rng_state(states, device)
        try:
            yield
        finally:
            if outer is not None:
                set_rng_state(outer, device)
