"""One forward and backward of a model that records which module made which tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from e2kd.errors import UnsupportedModel, shape
from e2kd.graph import before, between
from e2kd.modes import evaluating, kept_buffers, undrawn
from e2kd.outputs import first_tensor, logits_of

CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d)

CHANGES_IMAGES = (
    "{name} changes the images it is given in place, and everybody else who holds them would see others. Let its first "
    "operation make new ones: Normalize(mean, std) without inplace=True, (x - mean) / std."
)
FEATURES_FIRST = (
    "Expected logits first in what {name} returns, but the first tensor, {first}, is what another one, {other}, is "
    'computed from. Have it return the logits alone, first, or in a dict under "logits".'
)
FSDP1 = (
    "A module of {name} is a FullyShardedDataParallel, which breaks when a part of it is differentiated on its "
    "own: its weights would no longer be trained. Use fully_shard (FSDP2; Accelerate: fsdp_version 2)."
)


@dataclass(frozen=True)
class Turn:
    """One of the calls of a module within a forward; an activation may be shared by many layers.

    Attributes:
        name: of the module.
        index: which of its calls, from 0.
        count: how many there are.
    """

    name: str
    index: int = 0
    count: int = 1

    def is_call(self, number: int) -> bool:
        """Whether a module's call of this number, from 0, is the one."""
        return self.count == 1 or number == self.index


@dataclass
class Call:
    """One call of one module: the tensors it was given and the first tensor it returned."""

    name: str
    module: nn.Module
    inputs: tuple[Any, ...]
    output: Tensor | None = None
    bare: bool = False  # returned alone or first in a tuple, not inside a dict or ModelOutput
    gradient: Tensor | None = None  # of the top logits with respect to `output`
    made: bool = True  # new or changed in place, not an argument handed on (Identity, Dropout in eval mode)
    index: int = 0  # which of the module's calls
    versions: tuple[list[int | None], int | None] = ([], None)  # of inputs and output, as they passed

    @property
    def output_changes(self) -> bool:
        """Whether what comes after the call changes its output in place."""
        return _version(self.output) != self.versions[1]

    @property
    def input_changes(self) -> bool:
        """Whether the call, or what comes after it, changes its first argument in place."""
        return bool(self.inputs) and _version(self.inputs[0]) != self.versions[0][0]


@dataclass
class Trace:
    """The calls of one forward, in the order they ended.

    Attributes:
        convolved: the shapes of what convolutions and their norms returned, [B, C, h, w].
    """

    images: Tensor
    logits: Tensor
    calls: list[Call] = field(default_factory=list)
    head_input: Tensor | None = None  # what timm's `forward_head` was given
    convolved: set[tuple[int, ...]] = field(default_factory=set)

    @property
    def image_size(self) -> tuple[int, int]:
        return (self.images.shape[-2], self.images.shape[-1])

    def call_at(self, turn: Turn) -> Call:
        """One of a module's calls."""
        return self.calls[self._number(turn)]

    def output_at(self, turn: Turn) -> Tensor:
        """What a module returned in one of its calls."""
        output = self.call_at(turn).output
        assert output is not None
        return output

    def after(self, turn: Turn) -> list[Call]:
        """The calls that ended after one."""
        return self.calls[self._number(turn) + 1 :]

    def _number(self, turn: Turn) -> int:
        return next(n for n, call in enumerate(self.calls) if (call.name, call.index) == (turn.name, turn.index))

    def turn(self, call: Call) -> Turn:
        """Which call of its module a call is."""
        return Turn(call.name, call.index, sum(other.name == call.name for other in self.calls))

    def producers(self, tensor: Tensor) -> list[Turn]:
        """The calls that made this very tensor, outermost first; not those that pass it through."""
        return [self.turn(call) for call in reversed(self.calls) if call.output is tensor and call.name and call.made]

    def consumers(self, tensor: Tensor) -> list[tuple[Turn, int]]:
        """The calls that were given this very tensor, with its position among the arguments.

        Not those inside another such module, unless that is a plain sequence: with images of another size,
        a module may pool its argument before it hands it on.
        """
        given = [
            (call, position)
            for call in self.calls
            for position, value in enumerate(call.inputs)
            if value is tensor and call.name
        ]
        outer = [call.name + "." for call, _ in given if not isinstance(call.module, nn.Sequential)]
        return [(self.turn(call), position) for call, position in given if not call.name.startswith(tuple(outer))]

    def is_cut(self, tensor: Tensor) -> bool:
        """Whether the logits depend on the images through this tensor alone."""
        around = before(self.logits.grad_fn, without=tensor.grad_fn)
        return not any(getattr(node, "variable", None) is self.images for node in around)

    def around(self, tensor: Tensor) -> list[Call]:
        """The calls that don't depend on this tensor and through whose output the images reach the logits beside it."""
        way = set(before(self.logits.grad_fn, without=tensor.grad_fn))
        way -= set(between(tensor.grad_fn, self.logits.grad_fn))
        return [c for c in self.calls if c.name and c.made and c.output is not None and c.output.grad_fn in way]


@contextmanager
def _watching_head(model: nn.Module) -> Iterator[list[Any]]:
    """Collects what `forward_head` is given, for models built in timm's two halves."""
    given: list[Any] = []
    original = getattr(model, "forward_head", None)
    if not callable(original):
        yield given
        return

    def watched(features: Any, *args: Any, **kwargs: Any) -> Any:
        given.append(features)
        return original(features, *args, **kwargs)

    of_its_own = vars(model).get("forward_head")  # somebody's patch
    model.__dict__["forward_head"] = watched
    try:
        yield given
    finally:
        del model.__dict__["forward_head"]
        if of_its_own is not None:
            model.__dict__["forward_head"] = of_its_own


def _version(value: Any) -> int | None:
    """Counts in-place changes of a tensor; None where nobody counts."""
    return value._version if isinstance(value, Tensor) and not value.is_inference() else None


@contextmanager
def _recording(model: nn.Module, calls: list[Call]) -> Iterator[None]:
    open_calls: list[Call] = []
    begun: Counter[str] = Counter()

    def enter(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            given = [_version(value) for value in args]
            open_calls.append(Call(name, module, args, index=begun[name], versions=(given, None)))
            begun[name] += 1

        return hook

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        call = open_calls.pop()
        call.output = first_tensor(output)
        call.bare = output is call.output or (isinstance(output, (tuple, list)) and output[0] is call.output)
        given, _ = call.versions
        call.made = all(v is not call.output or _version(v) != n for v, n in zip(call.inputs, given, strict=True))
        call.versions = given, _version(call.output)
        calls.append(call)

    handles: list[Any] = []
    try:
        for name, module in model.named_modules():
            handles += [module.register_forward_pre_hook(enter(name)), module.register_forward_hook(leave)]
        yield
    finally:
        for handle in handles:
            handle.remove()


def trace(model: nn.Module, images: Tensor, *, jitter: float = 0.0) -> Trace:
    """Run the model on images [B, C, H, W] in eval mode and record every call and gradient.

    Mode, gradients, parameters, buffers and random state of the model are left as they were.

    Args:
        jitter: standard deviation of noise on the parameters during the probe, which makes the gradients of
            zero-initialised heads visible; the gradient is that of the top logit of each sample.
    """
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise UnsupportedModel(FSDP1.format(name=type(model).__name__))
    calls: list[Call] = []
    images = images.detach().clone().requires_grad_()
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        evaluating(model),
        kept_buffers(model.modules()),
        undrawn(images.device),
    ):
        passed = images.clone()
        version = passed._version
        with _recording(model, calls), _watching_head(model) as given:
            outputs = _run(model, passed, jitter)
        logits = _last(model, outputs)
        if passed._version != version:
            raise UnsupportedModel(CHANGES_IMAGES.format(name=type(model).__name__))
        head_input = first_tensor(given) if given and isinstance(given[-1], Tensor) else None
        made = (call.output for call in calls if isinstance(call.module, CONVOLUTIONS) and call.output is not None)
        found = Trace(images, logits, calls, head_input, {tuple(output.shape) for output in made})
        _fill_gradients(found)  # still in eval mode: activation checkpointing runs parts of the forward again
    return found


def _last(model: nn.Module, outputs: Any) -> Tensor:
    """The logits in what a model returned, from which nothing else in it was computed."""
    logits = logits_of(outputs)
    unnamed = isinstance(outputs, (tuple, list)) and not hasattr(outputs, "logits")
    for other in outputs if unnamed and logits.grad_fn is not None else ():
        if isinstance(other, Tensor) and other.ndim == 2 and logits.grad_fn in before(other.grad_fn)[1:]:
            raise UnsupportedModel(
                FEATURES_FIRST.format(name=type(model).__name__, first=shape(logits.shape), other=shape(other.shape))
            )
    return logits


def _run(model: nn.Module, images: Tensor, jitter: float) -> Any:
    if not jitter:
        return model(images)
    return torch.func.functional_call(model, noisy(model.named_parameters(), jitter), (images,))


def noisy(parameters: Iterable[tuple[str, Tensor]], jitter: float) -> dict[str, Tensor]:
    """Named parameters with normal noise of standard deviation `jitter`, always the same."""
    generator = torch.Generator().manual_seed(0)
    return {name: p.detach() + jitter * torch.randn(p.shape, generator=generator).to(p) for name, p in parameters}


def _fill_gradients(found: Trace) -> None:
    with_graph = [c for c in found.calls if c.output is not None and c.output.requires_grad]
    if not found.logits.requires_grad or not with_graph:
        return
    gradients = torch.autograd.grad(
        found.logits.amax(1).sum(),
        [call.output for call in with_graph if call.output is not None],
        allow_unused=True,
    )
    for call, gradient in zip(with_graph, gradients, strict=True):
        call.gradient = gradient
