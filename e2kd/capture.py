"""What a student's forward pass leaves for the loss: its images and the features at the site."""

from __future__ import annotations

import copy
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from e2kd.errors import Misplaced, shape
from e2kd.forward import Forward
from e2kd.hooks import Hooks
from e2kd.kernels import Within
from e2kd.listening import Place
from e2kd.modes import rng_state
from e2kd.outputs import first_tensor, images_in, logits_of
from e2kd.passes import PassKeeper
from e2kd.probe import Turn
from e2kd.sites import Site

COMPILED = (
    "If another model of this class was compiled in this process, torch.compile may have run its code: call "
    "torch.compiler.reset() in between, or set torch._dynamo.config.skip_nnmodule_hook_guards = False at the start."
)
NO_RECORD = (
    "The criterion was called without a training forward of the student before it. Expected "
    "`loss = criterion(student(images), targets)`, with a tensor of images [B, C, H, W], the student in train() mode "
    "and gradients enabled, once per forward and with what it returned. To combine two weighted losses of one "
    "output, as for mixed labels, call it once with soft labels. If the trainer runs a copy or another wrapper of the "
    "model, build the criterion with the module it trains. " + COMPILED
)
IN_BACKWARD = (
    "The criterion was called inside of backward, as when a checkpoint around student and criterion runs both again. "
    "Call it outside: loss = criterion(checkpoint(student, images, use_reentrant=False), targets)."
)
OVERWRITTEN = (
    "The images were changed in place after the student saw them and before the criterion was called, so the teacher "
    "would see different ones. Call the criterion before the next batch is written there, or give the student a copy."
)


class Meeting(Protocol):
    """Somebody who wants to see the first images of a training before the student does."""

    def meet(self, images: Tensor) -> None:
        """Images [B, C, H, W]."""


class Tap:
    """Hooks on a student that record its training forwards, and nothing in eval mode or under no_grad."""

    def __init__(self, student: nn.Module) -> None:
        self.student = student
        self.forwards: list[Forward] = []
        self.current: Forward | None = None  # of the forward that runs, or of a compiled student, ran last
        self.open = self.paused = False  # whether one runs, outside of compiled code
        self.hooks, self.site_hooks = Hooks(), Hooks()
        self.at_images = False
        self.keeper: PassKeeper | None = None
        self.notes_parameters = True  # whether anybody asks what a forward ran with
        self.explaining = True  # whether the next forward's loss is expected to explain it
        self.first: weakref.ref[Meeting] | None = None  # is shown the first images
        self.calls: dict[str, int] = {}  # how often modules ran that run several times, by their hooks
        _taps.setdefault(student, weakref.WeakSet()).add(self)
        self.hooks.before(student, self._enter, kwargs=True)
        self.hooks.after(student, self._leave)
        _forget_compiled()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tap:
        """Without what was recorded, which has a graph."""
        made: Tap = object.__new__(type(self))
        memo[id(self)] = made
        made.__dict__.update(copy.deepcopy(vars(self) | {"forwards": [], "current": None, "open": False}, memo))
        return made

    def read(self, site: Site | None) -> None:
        """Capture at this site from now on; None captures images alone."""
        self.site_hooks.remove()
        self.at_images, self.keeper = site is None, None
        if site is None:
            for child in self.student.children():
                self.site_hooks.before(child, self._began)
            return
        # Consumers come last and outside of checkpointed trunks; the last capture of a forward counts.
        turns = [*site.producers, *(turn for turn, _ in site.consumers)]
        sure = [turn for turn in turns if turn.count == 1] or turns
        for turn in reversed(site.producers):
            if turn in sure:
                self.site_hooks.after(self._module(turn), self._in(turn, self._produced))
        for turn, position in site.consumers:
            if turn in sure:
                self.site_hooks.before(self._module(turn), self._in(turn, _Consumed(self, position)))

    def listen(self, places: Iterable[Place]) -> None:
        """Hear these places in every recorded forward, besides the site."""
        for place in places:
            add = self.hooks.before if place.before else self.hooks.after
            add(self._module(place.turn), self._in(place.turn, _Passed(self, place)))

    def run_within(self, names: tuple[str, ...], context: Callable[[], AbstractContextManager[Any]]) -> None:
        """Run each of these modules inside of a context, in training forwards."""
        for name in names:  # every one, since a checkpoint may run a part again without what is around it
            module, within = self.student.get_submodule(name), Within(self.student, context)
            self.site_hooks.before(module, within.enter)
            self.site_hooks.after(module, within.leave, always=True)

    def keep_passes(self, keeper: PassKeeper) -> None:
        """Run the forwards that are expected to be explained so that their dynamic weights can be read."""
        self.keeper = keeper
        if keeper.encoder is not None:
            self.site_hooks.after(self.student.get_submodule(keeper.encoder), keeper.encoded)
        self.site_hooks.after(self.student, keeper.end, always=True)

    def remove(self) -> None:
        """Take every hook off the student and forget what was recorded."""
        self.hooks.remove()
        self.site_hooks.remove()
        self.forwards.clear()
        self._begin(None)

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

    def forward_of(self, logits: Tensor) -> Forward:
        """The forward that made these logits.

        Raises:
            RuntimeError: when there was none.
        """
        if _in_backward():
            raise Misplaced(IN_BACKWARD)
        forward = self.take(logits)
        if forward is None:
            raise RuntimeError(NO_RECORD)
        if len(forward.images) != len(logits):
            raise ValueError(
                f"The student was given images {shape(forward.images.shape)} but the criterion logits "
                f"{shape(logits.shape)}. Pass the whole output of one forward."
            )
        if forward.overwritten:
            raise RuntimeError(OVERWRITTEN)
        return forward

    def take(self, logits: Tensor) -> Forward | None:
        """The record of the forward that made these logits; None if there is none or it can't be told which."""
        self._close(None)  # a compiled student's forward does not, nor one that was interrupted
        made = [forward for forward in self.forwards if forward.made(logits)]
        unknown = [forward for forward in self.forwards if forward.mark is None]
        found = made[-1] if made else unknown[-1] if unknown else None
        if found is not None:
            self.forwards = [forward for forward in self.forwards if forward is not found]
        return found

    @property
    def recording(self) -> bool:
        """Whether what runs now belongs to a recorded forward."""
        if self.paused:
            return False
        return self.open or (torch.compiler.is_compiling() and self.student.training and torch.is_grad_enabled())

    def keep(self, features: Tensor | None) -> None:
        """Remember the tensor at the site, if it belongs to a recorded forward."""
        forward = self._recorded()
        if forward is None or features is None:
            return
        forward.features = features
        forward.autocast = _autocast_type(features.device)  # hosts may put it inside of the forward, as Accelerate
        if torch.compiler.is_compiling():
            forward.compiled = True
        else:
            forward.rng = rng_state(features.device)

    def hear(self, key: str, tensor: Tensor | None) -> None:
        """Remember a tensor at a place, if it belongs to a recorded forward."""
        forward = self._recorded()
        if forward is not None and tensor is not None:
            forward.heard[key] = tensor

    def _recorded(self) -> Forward | None:
        """The forward that a tensor belongs to, if it is recorded."""
        return self.current if self.recording and torch.is_grad_enabled() else None

    def _module(self, turn: Turn) -> nn.Module:
        return self.student.get_submodule(turn.name)

    def _in(self, turn: Turn, action: Any) -> Any:
        """An action in this call of a module alone."""
        return action if turn.count == 1 else _InTurn(self, turn, action)

    def _enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Returns the arguments to run the student with, None for those that came."""
        if self.paused or not self.student.training or not torch.is_grad_enabled():
            return None
        if torch.compiler.is_compiling():
            self._begin(images_in(args, kwargs), compiled=True)
            return None
        if _in_backward():  # a checkpoint recomputes the forward
            return None
        self.forwards = [forward for forward in self.forwards if forward.alive]
        images = images_in(args, kwargs)
        if images is not None and self.first is not None and (meeting := self.first()) is not None:
            meeting.meet(images)
        forward, self.open = self._begin(images), True
        if forward is None:
            return None
        forward.version = None if forward.images.is_inference() else forward.images._version
        ddp = getattr(DistributedDataParallel, "_active_ddp_module", None)
        forward.static_graph = bool(ddp is not None and ddp.static_graph)
        forward.rng = rng_state(forward.device) if self.at_images else None
        if self.keeper is None or not self.explaining:
            return None
        return self.keeper.begin(forward.images, args, kwargs)

    def _begin(self, images: Tensor | None, *, compiled: bool = False) -> Forward | None:
        """A new record; None, with none of another forward left, where the student was given no images."""
        self.current, self.calls, self.open = None, {}, False
        if images is not None:
            self.current = Forward(images, autocast=_autocast_type(images.device), compiled=compiled)
        return self.current

    def _began(self, args: tuple[Any, ...]) -> None:
        """The forward has come to a part of the student: inside of what hosts put into it."""
        if self.recording and self.current is not None and self.current.autocast is None:
            self.current.autocast = _autocast_type(self.current.device)

    def _produced(self, args: tuple[Any, ...], output: Any) -> None:
        self.keep(first_tensor(output))

    def _leave(self, args: tuple[Any, ...], output: Any) -> None:
        if self.paused or torch.compiler.is_compiling() or not self.open:
            return
        try:
            logits = logits_of(output)
        except (TypeError, ValueError):  # a call for something else, as for features: no loss will come of it
            self._begin(None)
        else:
            if self.current is not None and self.notes_parameters:
                self.current.ran_in(self.student)
            self._close(logits)

    def _close(self, logits: Tensor | None) -> None:
        forward = self.current
        self._begin(None)
        if forward is None:
            return
        forward.explained = None if self.keeper is None else self.keeper.found
        if forward.explained is not None and logits is not None:
            forward.explained.logits = logits.clone()  # the trainer's own may be changed in place, or wrapped
        if logits is not None:
            forward.end(logits)
        forward.random = self._drew(forward)
        self.forwards.append(forward)

    def _drew(self, forward: Forward) -> bool:
        """Whether a forward drew random numbers; looked at where samples may be run again on their own."""
        if not self.at_images or forward.rng is None:
            return False
        return _differ(forward.rng, rng_state(forward.device))


def _forget_compiled() -> None:
    """Have torch.compile look at every model anew.

    It runs what it made for one model in another of the same class, whether hooks listen there or not
    (`torch._dynamo.config.skip_nnmodule_hook_guards`).
    """
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


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
