"""The student's own forward as a pass whose dynamic weights can be read afterwards."""

from __future__ import annotations

import weakref
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from e2kd.bcos.mode import ExplanationMode, explanation_mode
from e2kd.bcos.norms import BatchNormUncentered2d
from e2kd.bcos.statistics import Kept, is_checkpointed, keeping_statistics
from e2kd.held import uses_batch
from e2kd.modes import is_compiled
from e2kd.views import differentiable


@dataclass
class Pass:
    """What one forward of a B-cos network left.

    Attributes:
        mode: the explanation mode it ran in.
        statistics: of the batch norms, and what the layers returned, in the order they ran.
        encoded: the images that W(x) is a gradient of, where they were made to require one.
        logits: [B, K], as the network itself returned them.
    """

    mode: ExplanationMode
    statistics: Kept = field(default_factory=list)
    encoded: Tensor | None = None
    logits: Tensor | None = None

    @property
    def readable(self) -> bool:
        """Whether W(x) can be read from it: in full precision, whatever autocast was put inside of the forward."""
        return self.encoded is not None and self.logits is not None and not self.mode.low_precision


_OPEN: weakref.WeakKeyDictionary[nn.Module, Pass] = weakref.WeakKeyDictionary()  # whose forward runs now


class PassKeeper:
    """Actions of hooks between which a student's forward runs in explanation mode.

    Args:
        student: the network.
        encoder: name of the module that encodes its images; None where they come encoded.
        weights: whether W(x) will be read from the pass; else it keeps its statistics alone.
    """

    def __init__(self, student: nn.Module, encoder: str | None, *, weights: bool) -> None:
        self.student, self.encoder, self.weights = student, encoder, weights
        self.stack = ExitStack()
        self.found: Pass | None = None

    def begin(self, images: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the forward; returns the arguments it is to be given, None for those that came."""
        self.end()  # an interrupted forward may have left it open
        if is_compiled(self.student):
            return None
        self.found = _OPEN.get(self.student) or self._open()
        if self.found.encoded is not None or not self._reads(images) or self.encoder is not None:
            return None
        self.found.encoded = differentiable(images)
        return _replaced(args, kwargs, images, self.found.encoded)

    def encoded(self, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """After the module that encodes the images; returns what is to be its output, None for what it is."""
        if torch.compiler.is_compiling() or self.found is None or not self._reads(output):
            return None
        if self.found.encoded is not None:  # by another criterion of this student
            return None
        self.found.encoded = differentiable(output)
        return self.found.encoded

    def end(self, *_: Any) -> None:
        """After the forward, and when it raised."""
        if torch.compiler.is_compiling():
            return
        self.stack.close()
        self.found = None

    def _open(self) -> Pass:
        """A new pass, which other criteria of this student share until its forward ends."""
        found = Pass(self.stack.enter_context(explanation_mode(compact=True)))
        self.stack.enter_context(keeping_statistics(found.statistics))
        _OPEN[self.student] = found
        self.stack.callback(_OPEN.pop, self.student, None)
        return found

    def _reads(self, images: Tensor) -> bool:
        """Whether W(x) can be read in full precision from a pass over these images."""
        full = images.dtype in (torch.float32, torch.float64)
        plain = not torch.is_autocast_enabled(images.device.type) and not images.is_inference()
        return self.weights and full and plain and not is_checkpointed()


def _replaced(args: tuple[Any, ...], kwargs: dict[str, Any], old: Tensor, new: Tensor) -> Any:
    return tuple(new if v is old else v for v in args), {k: new if v is old else v for k, v in kwargs.items()}


def alone_in_batch(model: nn.Module, *, kept: bool) -> bool:
    """Whether samples may be run again without the rest of their batch.

    Args:
        kept: whether the statistics of the whole batch were kept, of those batch norms that can use them.

    >>> alone_in_batch(nn.BatchNorm2d(3), kept=False), alone_in_batch(nn.BatchNorm2d(3).eval(), kept=False)
    (False, True)
    """
    mixing = filter(uses_batch, model.modules())
    return all(kept and isinstance(m, BatchNormUncentered2d) for m in mixing)
