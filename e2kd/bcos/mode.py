"""Explanation mode: which forward passes can be explained, and when their dynamic weights are held fixed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor


class ExplanationMode:
    """What the layers of an explained pass share with each other; made by `explanation_mode`.

    The state belongs to the pass, not to the modules: other threads and other passes of the same modules
    don't see it.
    """

    def __init__(self, *, detached: bool = False, compact: bool = False) -> None:
        self.detached = detached  # dynamic weights are constants of the pass
        self.compact = compact  # explained at its images alone
        self.last: Any = None  # the B-cos layer that ran last in a compact pass
        self.holding = 0  # calls of `weights` that run now
        self.held = 0  # dynamic weights that the last one held fixed
        self.met = 0  # dynamic weights that became constants
        self.low_precision = False  # whether a layer ran in a half precision

    def weights(
        self, scores: Tensor, images: Tensor, *, create_graph: bool = False, retain_graph: bool | None = None
    ) -> Tensor:
        """The dynamic weights W(x): the gradient of the scores' sum, all dynamic weights held fixed.

        With `create_graph=True` W is differentiable. Its derivative is the true one, of a W whose dynamic weights
        depend on the parameters and on the images; gradients of the scores themselves stay the ordinary ones.

        Args:
            scores: what is explained, of any shape: one logit of each sample [B], or `(outputs * cotangent)`.
            images: what the scores depend on, [B, C, H, W] or any shape; must require a gradient.
            create_graph: for losses of W.
            retain_graph: keep the pass for another explanation; as `create_graph` if None.

        Returns:
            W, in the shape of the images.

        Raises:
            RuntimeError: when no layer of this mode lies between images and scores.

        >>> from e2kd.bcos import BcosLinear, explanation_mode
        >>> layer, x = BcosLinear(4, 3), torch.rand(2, 4, requires_grad=True)
        >>> with explanation_mode() as mode:
        ...     y = layer(x)
        >>> w = mode.weights(y[:, 0], x)
        >>> torch.allclose((w * x).sum(1), y[:, 0])
        True
        """
        self.held = 0
        self.holding += 1
        try:
            (found,) = torch.autograd.grad(scores.sum(), images, create_graph=create_graph, retain_graph=retain_graph)
        finally:
            self.holding -= 1
        if not (self.held or self.met):
            raise RuntimeError(
                "Expected scores computed inside of this explanation mode by layers with dynamic weights, but no "
                "such layer was met between the images and the scores. Run the forward pass inside of "
                "`with explanation_mode() as mode:` and explain it with that `mode`."
            )
        return found

    def fixes(self) -> bool:
        """Whether a backward pass that runs now must hold the dynamic weights fixed; counts them."""
        self.held += self.holding > 0
        return self.holding > 0


_CURRENT: ContextVar[ExplanationMode | None] = ContextVar("explanation mode", default=None)


@contextmanager
def explanation_mode(*, detached: bool = False, compact: bool = False) -> Iterator[ExplanationMode]:
    """Inside, B-cos layers run so that they can be explained: `mode.weights(scores, images)`, inside or afterwards.

    Outputs and ordinary gradients are the same inside and outside. The mode is that of the thread (and of the
    asyncio task) that enters it. Entered again inside of itself it stays the same mode; an exception leaves it.

    Args:
        detached: for networks that are explained and not trained: dynamic weights become constants of the pass, which
            takes less memory and time. Gradients of such a pass are those of W(x) alone, and W has no derivative.
        compact: for networks that are trained by W(x): layers keep less, and the derivative of W takes less time.
            `weights` may then be asked at the images alone, not at features or parameters, and has a first derivative
            but no second.

    >>> from e2kd.bcos import BcosConv2d
    >>> images = torch.rand(2, 6, 8, 8, requires_grad=True)
    >>> with explanation_mode() as mode:
    ...     logits = BcosConv2d(6, 10, 3)(images).mean((2, 3))
    >>> mode.weights(logits.amax(1), images).shape
    torch.Size([2, 6, 8, 8])
    """
    mode = _CURRENT.get()
    if mode is None or (mode.detached, mode.compact) != (detached, compact):
        mode = ExplanationMode(detached=detached, compact=compact)
    token = _CURRENT.set(mode)
    try:
        yield mode
    finally:
        mode.last = None
        _CURRENT.reset(token)


def current_mode() -> ExplanationMode | None:
    """The mode this thread is in, None outside of all.

    >>> current_mode() is None
    True
    """
    return _CURRENT.get()
