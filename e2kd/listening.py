"""Tensors inside a model by name, and hearing them while the model runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from e2kd.hooks import Hooks
from e2kd.outputs import first_tensor
from e2kd.probe import CONVOLUTIONS, Turn


@dataclass(frozen=True)
class Place:
    """A tensor inside a model: what a module returns in one of its calls, or what it is given.

    Attributes:
        turn: the call.
        before: whether it is the call's first argument, and not its output.
        copied: whether it has to be copied when it passes, since what comes after works in place.
    """

    turn: Turn
    before: bool = False
    copied: bool = False

    @property
    def module(self) -> str:
        """The module's name."""
        return self.turn.name

    @property
    def key(self) -> str:
        """A name for the place, for dictionaries."""
        return f"{'before ' * self.before}{self.module}{f' {self.turn.index}' if self.turn.count > 1 else ''}"

    def tensor(self, value: Any) -> Tensor | None:
        """The tensor in what the module was given or returned, copied if need be; None if there is none."""
        found = first_tensor(value)
        return found.clone() if self.copied and found is not None else found


@contextmanager
def hearing(model: nn.Module, places: Iterable[Place]) -> Iterator[dict[str, Tensor]]:
    """Collects what passes at places in every forward of a whole model, by their keys and without a graph.

    Parts of the model that are run on their own are not listened to.

    >>> import torch
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(inplace=True))
    >>> with hearing(model, [Place(Turn("1"), copied=True), Place(Turn("1"), before=True)]) as heard:
    ...     _ = model(torch.ones(2, 1, 2, 2))
    >>> {key: tuple(value.shape) for key, value in heard.items()}
    {'before 1': (2, 4), '1': (2, 3)}
    """
    heard: dict[str, Tensor] = {}
    calls: Counter[Place] = Counter()
    running = False

    def begin(module: nn.Module, args: Any) -> None:
        nonlocal running
        running = True
        calls.clear()

    def end(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal running
        running = False

    def listener(place: Place) -> Any:
        def hook(module: nn.Module, args: Any, output: Any = None) -> None:
            if not running:
                return
            number, calls[place] = calls[place], calls[place] + 1
            tensor = place.tensor(args if place.before else output) if place.turn.is_call(number) else None
            if tensor is not None:
                heard[place.key] = tensor.detach()

        return hook

    handles: list[Any] = [model.register_forward_pre_hook(begin)]
    try:
        for place in places:
            module, hook = model.get_submodule(place.module), listener(place)
            handles.append(
                module.register_forward_pre_hook(hook) if place.before else module.register_forward_hook(hook)
            )
        handles.append(model.register_forward_hook(end, always_call=True))
        yield heard
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def convolving(model: nn.Module) -> Iterator[set[tuple[int, ...]]]:
    """Inside, forwards add the shapes of what their convolutions return, [B, C, h, w]."""
    shapes: set[tuple[int, ...]] = set()
    hooks = Hooks()
    try:
        for module in model.modules():
            if isinstance(module, CONVOLUTIONS):
                hooks.after(module, lambda args, output: shapes.add(tuple(output.shape)))
        yield shapes
    finally:
        hooks.remove()


@dataclass(frozen=True)
class Heard:
    """What a teacher said and held for one batch; nothing in it has a gradient.

    Attributes:
        images: the student's images [B, C, H, W], by which the batch is known.
        size: (H, W) of the images that the teacher was given for them.
        logits: [B, K].
        tensors: what passed at the places, by their keys.
    """

    images: Tensor
    size: tuple[int, int]
    logits: Tensor
    tensors: dict[str, Tensor]


class Ear:
    """Somebody who wants to know what a teacher holds at places, each time it is asked, whoever asks."""

    def __init__(self, places: Iterable[Place]) -> None:
        self.places = tuple(dict.fromkeys(places))
        self.heard: Heard | None = None

    def take(self, images: Tensor) -> Heard | None:
        """What was heard for these images, once; None where the teacher was not asked about them since."""
        found, self.heard = self.heard, None
        return found if found is not None and _same(found.images, images) else None


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are one, or views of the same unchanged memory."""
    if a is b:
        return True
    return a.shape == b.shape and a.dtype == b.dtype and a.data_ptr() == b.data_ptr() and a._version == b._version
