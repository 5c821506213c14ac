"""What a student's forward pass leaves for the loss: its images and the features at the site."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.parallel import DistributedDataParallel

from e2kd.errors import shape
from e2kd.kernels import Within
from e2kd.listening import Place
from e2kd.modes import rng_state
from e2kd.outputs import first_tensor, images_in, logits_of
from e2kd.passes import Pass, PassKeeper
from e2kd.probe import Turn
from e2kd.sites import Site

COMPILED = (
    "If another model of this class was compiled in this process, torch.compile may have run its code: call "
    "torch.compiler.reset() in between, or set torch._dynamo.config.skip_nnmodule_hook_guards = False at the start."
)
NO_RECORD = (
    "The criterion was called without a training forward of the student before it. Expected "
    "`loss = criterion(student(images), targets)` with the student in train() mode and gradients enabled, once per "
    "forward. If the trainer runs a copy or another wrapper of the model, build the criterion with the module it "
    "trains. " + COMPILED
)


@dataclass
class Record:
    """One training forward of the student, kept until the loss has used it."""

    images: Tensor
    features: Tensor | None = None
    rng: list[Tensor] | None = None  # random state when the head began
    autocast: torch.dtype | None = None
    static_graph: bool = False  # inside DistributedDataParallel(static_graph=True)
    compiled: bool = False
    node: Node | None = None  # what made the logits
    logits: weakref.ref[Tensor] | None = None
    random: bool = False  # whether it drew random numbers, where that was looked at
    explained: Pass | None = None  # of a B-cos network
    heard: dict[str, Tensor] = field(default_factory=dict)  # at the places that were listened to, by their keys

    def autocasting(self) -> AbstractContextManager[Any]:
        """The precision that the forward ran in, for a teacher that is asked in the same."""
        return torch.autocast(self.images.device.type, self.autocast, enabled=self.autocast is not None)


def _inert(*_: Any) -> None:
    """What a copied or unpickled hook does."""


def _make_inert() -> Any:
    return _inert


class _Hook:
    """A hook of one module that copies and pickles to nothing, so that EMA copies and checkpoints stay clean."""

    def __init__(self, module: nn.Module, action: Any) -> None:
        self.module, self.action = module, action

    def __call__(self, module: nn.Module, *args: Any) -> Any:
        return self.action(*args) if module is self.module else None

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _inert

    def __reduce__(self) -> Any:
        return _make_inert, ()


class Meeting(Protocol):
    """Somebody who wants to see the first images of a training before the student does."""

    def meet(self, images: Tensor) -> None:
        """Images [B, C, H, W]."""


class Tap:
    """Hooks on a student that record its training forwards, and nothing in eval mode or under no_grad."""

    def __init__(self, student: nn.Module) -> None:
        self.student = student
        self.records: list[Record] = []
        self.images: Tensor | None = None  # of the open forward
        self.features: Tensor | None = None
        self.rng: list[Tensor] | None = None
        self.open = self.paused = self.static_graph = self.compiled = False
        self.autocast: torch.dtype | None = None
        self.handles: list[Any] = []
        self.site_handles: list[Any] = []
        self.at_images = False
        self.keeper: PassKeeper | None = None
        self.explaining = True  # whether the next forward's loss is expected to explain it
        self.first: weakref.ref[Meeting] | None = None  # is shown the first images
        self.heard: dict[str, Tensor] = {}
        self.calls: dict[str, int] = {}  # how often modules ran that run several times, by their hooks
        _taps.setdefault(student, weakref.WeakSet()).add(self)
        self._add(self.handles, student, self._enter, pre=True, kwargs=True)
        self._add(self.handles, student, self._leave)
        _forget_compiled()

    def read(self, site: Site | None) -> None:
        """Capture at this site from now on; None captures images alone."""
        self._drop(self.site_handles)
        self.at_images, self.keeper = site is None, None
        if site is None:
            for child in self.student.children():
                self._add(self.site_handles, child, self._began, pre=True)
            return
        # Consumers come last and outside of checkpointed trunks; the last capture of a forward counts.
        turns = [*site.producers, *(turn for turn, _ in site.consumers)]
        sure = [turn for turn in turns if turn.count == 1] or turns
        for turn in reversed(site.producers):
            if turn in sure:
                self._capture(self.site_handles, turn, self._produced)
        for turn, position in site.consumers:
            if turn in sure:
                self._capture(self.site_handles, turn, _Consumed(self, position), pre=True)

    def listen(self, places: Iterable[Place]) -> None:
        """Hear these places in every recorded forward, besides the site."""
        for place in places:
            self._capture(self.handles, place.turn, _Passed(self, place), pre=place.before)

    def _capture(self, handles: list[Any], turn: Turn, action: Any, *, pre: bool = False) -> None:
        """Hook one call of a module."""
        if turn.count > 1:
            action = _InTurn(self, turn, action)
        self._add(handles, self.student.get_submodule(turn.name), action, pre=pre)

    def run_within(self, names: tuple[str, ...], context: Callable[[], AbstractContextManager[Any]]) -> None:
        """Run each of these modules inside of a context, in training forwards."""
        for name in names:  # every one, since a checkpoint may run a part again without what is around it
            module, within = self.student.get_submodule(name), Within(self.student, context)
            self._add(self.site_handles, module, within.enter, pre=True)
            self._add(self.site_handles, module, within.leave, always=True)

    def keep_passes(self, keeper: PassKeeper) -> None:
        """Run the forwards that are expected to be explained so that their dynamic weights can be read."""
        self.keeper = keeper
        if keeper.encoder is not None:
            self._add(self.site_handles, self.student.get_submodule(keeper.encoder), keeper.encoded)
        self._add(self.site_handles, self.student, keeper.end, always=True)

    def remove(self) -> None:
        """Take every hook off the student and forget what was recorded."""
        self._drop(self.handles)
        self._drop(self.site_handles)
        self.records.clear()
        self._clear()

    @contextmanager
    def silent(self) -> Iterator[None]:
        """No capture inside, by any tap on the student: for passes that e2kd itself runs."""
        taps = list(_taps[self.student])
        before = [tap.paused for tap in taps]
        for tap in taps:
            tap.paused = True
        try:
            yield
        finally:
            for tap, paused in zip(taps, before, strict=True):
                tap.paused = paused

    def record(self, logits: Tensor) -> Record:
        """The forward that made these logits.

        Raises:
            RuntimeError: when there was none.
        """
        record = self.take(logits)
        if record is None:
            raise RuntimeError(NO_RECORD)
        if len(record.images) != len(logits):
            raise ValueError(
                f"The student was given images {shape(record.images.shape)} but the criterion logits "
                f"{shape(logits.shape)}. Pass the whole output of one forward."
            )
        return record

    def take(self, logits: Tensor) -> Record | None:
        """The record of the forward that made these logits; None if there is none or it can't be told which."""
        if self.open or self.compiled:
            self._close(None)
        made = [r for r in self.records if r.node is not None and _descends(logits, r.node)]
        unknown = [r for r in self.records if r.node is None]
        found = made[-1] if made else unknown[-1] if unknown else None
        if found is not None:
            self.records = [r for r in self.records if r is not found]
        return found

    def _add(
        self,
        handles: list[Any],
        module: nn.Module,
        action: Any,
        *,
        pre: bool = False,
        kwargs: bool = False,
        always: bool = False,
    ) -> None:
        hook = _Hook(module, action)
        if pre:
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=kwargs))
        else:
            handles.append(module.register_forward_hook(hook, always_call=always))

    def _drop(self, handles: list[Any]) -> None:
        for handle in handles:
            handle.remove()
        handles.clear()

    def _clear(self) -> None:
        self.images = self.features = self.rng = None
        self.heard, self.calls = {}, {}
        self.open = self.compiled = False

    def _enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Returns the arguments to run the student with, None for those that came."""
        if self.paused or not self.student.training or not torch.is_grad_enabled():
            return None
        if torch.compiler.is_compiling():
            self.images, self.features, self.compiled = images_in(args, kwargs), None, True
            self.heard, self.calls = {}, {}
            self.autocast = None if self.images is None else _autocast_type(self.images.device)
            return None
        if torch._C._current_graph_task_id() != -1:  # a checkpoint recomputes the forward inside backward
            return None
        self.records = [r for r in self.records if r.logits is not None and r.logits() is not None]
        self._clear()
        images = images_in(args, kwargs)
        if images is not None and self.first is not None and (meeting := self.first()) is not None:
            meeting.meet(images)
        self.images, self.open = images, True
        ddp = getattr(DistributedDataParallel, "_active_ddp_module", None)
        self.static_graph = bool(ddp is not None and ddp.static_graph)
        if images is None:
            return None
        self.autocast = _autocast_type(images.device)
        self.rng = rng_state(images.device) if self.at_images else None
        return self.keeper.begin(images, args, kwargs) if self.keeper is not None and self.explaining else None

    def _began(self, args: tuple[Any, ...]) -> None:
        """The forward has come to a part of the student: inside of what hosts put into it."""
        if self.recording and self.images is not None and self.autocast is None:
            self.autocast = _autocast_type(self.images.device)

    def _produced(self, args: tuple[Any, ...], output: Any) -> None:
        self.keep(first_tensor(output))

    def keep(self, features: Tensor | None) -> None:
        """Remember the tensor at the site, if it belongs to a recorded forward."""
        if self.paused or features is None or not torch.is_grad_enabled():
            return
        if torch.compiler.is_compiling():
            if self.student.training:
                self.features, self.compiled = features, True
                self.autocast = _autocast_type(features.device)
            return
        if self.open:
            self.features, self.rng = features, rng_state(features.device)
            self.autocast = _autocast_type(features.device)  # hosts may put it inside of the forward, as Accelerate

    @property
    def recording(self) -> bool:
        """Whether what runs now belongs to a recorded forward."""
        if self.paused:
            return False
        return self.open or (torch.compiler.is_compiling() and self.student.training and torch.is_grad_enabled())

    def hear(self, key: str, tensor: Tensor | None) -> None:
        """Remember a tensor at a place, if it belongs to a recorded forward."""
        if self.paused or tensor is None or not torch.is_grad_enabled():
            return
        if self.open or (torch.compiler.is_compiling() and self.student.training):
            self.heard[key] = tensor

    def _leave(self, args: tuple[Any, ...], output: Any) -> None:
        if self.paused or torch.compiler.is_compiling() or not self.open:
            return
        self._close(logits_of(output))

    def _drew(self) -> bool:
        """Whether the open forward drew random numbers; looked at where samples may be run again on their own."""
        if not (self.at_images and self.rng is not None and self.images is not None):
            return False
        return _differ(self.rng, rng_state(self.images.device))

    def _close(self, logits: Tensor | None) -> None:
        if self.images is not None:
            explained = None if self.keeper is None else self.keeper.found
            if explained is not None and logits is not None:
                explained.logits = logits.clone()  # the trainer's own may be changed in place, or wrapped
            self.records.append(
                Record(
                    self.images,
                    self.features,
                    self.rng,
                    self.autocast,
                    self.static_graph,
                    self.compiled,
                    None if logits is None else logits.grad_fn,
                    None if logits is None else weakref.ref(logits),
                    self._drew(),
                    explained,
                    self.heard,
                )
            )
        self._clear()


def _forget_compiled() -> None:
    """Have torch.compile look at every model anew.

    It runs what it made for one model in another of the same class, whether hooks listen there or not
    (`torch._dynamo.config.skip_nnmodule_hook_guards`).
    """
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _differ(before: list[Tensor], after: list[Tensor]) -> bool:
    return any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def _autocast_type(device: torch.device) -> torch.dtype | None:
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


class _InTurn:
    """A hook's action: another's, in one of the calls that a module has within a recorded forward."""

    def __init__(self, tap: Tap, turn: Turn, action: Any) -> None:
        self.tap, self.turn, self.action = tap, turn, action
        self.key = f"{turn.name} {id(self)}"

    def __call__(self, *args: Any) -> None:
        if not self.tap.recording:
            return
        number = self.tap.calls.get(self.key, 0)
        self.tap.calls[self.key] = number + 1
        if self.turn.is_call(number):
            self.action(*args)


class _Consumed:
    """A pre-hook's action: remember one of the module's arguments."""

    def __init__(self, tap: Tap, position: int) -> None:
        self.tap, self.position = tap, position

    def __call__(self, args: tuple[Any, ...]) -> None:
        if self.position < len(args) and isinstance(args[self.position], Tensor):
            self.tap.keep(args[self.position])


class _Passed:
    """A hook's action: remember what passes at a place."""

    def __init__(self, tap: Tap, place: Place) -> None:
        self.tap, self.place = tap, place

    def __call__(self, args: tuple[Any, ...], output: Any = None) -> None:
        self.tap.hear(self.place.key, self.place.tensor(args if self.place.before else output))


_taps: weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[Tap]] = weakref.WeakKeyDictionary()  # by student


def _descends(logits: Tensor, node: Node, steps: int = 64) -> bool:
    """Whether logits were made by a node, perhaps through casts, slices or a wrapper's identity functions."""
    queue = [logits.grad_fn]
    for current in queue:
        if current is node:
            return True
        if current is not None and len(queue) < steps:
            queue.extend(parent for parent, _ in current.next_functions)
    return False
