"""A head that reads a class token, run for that token alone once the patch tokens are mixed for the last time."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from e2kd.heads import Head, Running
from e2kd.modes import evaluating, replaying
from e2kd.probe import Trace, noisy
from e2kd.sharding import is_sharded
from e2kd.sites import JITTER, Site

ATTENTION = (F.scaled_dot_product_attention, F.multi_head_attention_forward)  # (query, key, value, ...)
PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm)
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
LOW_PRECISION_TOLERANCE = 0.03


class NotNarrow(Exception):
    """The head needs more than its first tokens."""


class _Mixed(Exception):
    """The keys and values of all tokens are known."""


def _is_product(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether two activations are multiplied, as attention written out does twice; not one with a weight."""
    return func in PRODUCTS and all(isinstance(value, Tensor) and value.ndim >= 3 for value in args)


class _Collect(TorchFunctionMode):
    """Runs up to the first attention and keeps what it mixes: the keys and the values, of all tokens."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens, self.kept = tokens, list[Tensor]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in ATTENTION:
            self.kept += args[1:3]
        elif _is_product(func, args):
            self.kept.append(args[1])
        else:
            return func(*args, **(kwargs or {}))
        if len(self.kept) == 2:
            raise _Mixed
        return func(args[0][..., : self.tokens, :], *args[1:])


class _Supply(TorchFunctionMode):
    """Runs the first tokens, whose attention is given the kept keys and values in place of their own."""

    def __init__(self, tokens: int, kept: list[Tensor]) -> None:
        super().__init__()
        self.tokens, self.kept = tokens, list(kept)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in ATTENTION:
            key, value = self._next(), self._next()
            if isinstance(mask := kwargs.get("attn_mask"), Tensor):
                kwargs["attn_mask"] = mask[..., : self.tokens, :]
            return func(args[0], key, value, *args[3:], **kwargs)
        if _is_product(func, args):
            return func(args[0], self._next())
        return func(*args, **kwargs)

    def _next(self) -> Tensor:
        if not self.kept:
            raise NotNarrow("tokens are mixed more than once")
        return self.kept.pop(0)


class NarrowHead:
    """The head of a class-token transformer without the work on patch tokens that nobody reads. Exact.

    After its last attention such a head treats every token alone and reads the first few. So its own code runs twice:
    over all tokens until the attention has its keys and values, and over the first `tokens` from beginning to end,
    attending to those. Queries, projection, MLP, norms and classifier are computed for the first tokens only.
    """

    def __init__(self, head: Head, tokens: int) -> None:
        self.head, self.tokens = head, tokens

    def __call__(self, features: Tensor) -> Tensor:
        """Explained features [B, N, C] -> logits [B, K].

        Raises:
            NotNarrow: when the head can't run so, in this mode or with these images.
        """
        try:
            supply = _Supply(self.tokens, self._mixed(features))
            with supply:
                logits = self.head(features[:, : self.tokens])
        except NotNarrow:
            raise
        except Exception as error:  # code that counts on all tokens may fail in any way
            raise NotNarrow(f"{type(error).__name__}: {error}") from error
        if supply.kept:
            raise NotNarrow("the first tokens are not mixed as all are")
        return logits

    def _mixed(self, features: Tensor) -> list[Tensor]:
        collect = _Collect(self.tokens)
        try:
            with collect:
                self.head(features)
        except _Mixed:
            return collect.kept
        raise NotNarrow("no attention")


def find_narrow(head: Head | None, site: Site, found: Trace, after: tuple[str, ...]) -> NarrowHead | None:
    """The narrow form of a head, or None. Kept only if it gives the head's logits and their gradient.

    Both are compared with noise on the parameters of the modules `after` the site, so that no zero-initialised scale
    or classifier hides a difference.
    """
    if head is None or site.layout.order != "NLC" or site.layout.prefix == 0:
        return None
    modules = [(f"model.{name}.", head.model.get_submodule(name)) for name in after]
    parameters = [(name + p, value) for name, m in modules for p, value in m.named_parameters(recurse=False)]
    if any(is_sharded(value) for _, value in parameters):
        return None
    narrow = NarrowHead(head, site.layout.prefix)
    features = head.prologue(found.output_at(site.producers[0]).detach())
    try:
        mine = _probed(Running(head.model, narrow), features, parameters)
    except NotNarrow:
        return None
    pairs = zip(mine, _probed(Running(head.model, head), features, parameters), strict=True)
    return narrow if all(_same(own, full) for own, full in pairs) else None


def _probed(running: Running, features: Tensor, parameters: list[tuple[str, nn.Parameter]]) -> tuple[Tensor, Tensor]:
    """Logits [B, K] and the gradient of a random combination of them with respect to the features."""
    model, features = running.model, features.clone().requires_grad_()
    with torch.enable_grad(), evaluating(model), replaying(model, features.device, None):
        logits = torch.func.functional_call(running, noisy(parameters, JITTER), (features,))
    along = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).to(logits)
    (gradient,) = torch.autograd.grad((logits * along).sum(), features)
    return logits.detach(), gradient


def _same(mine: Tensor, full: Tensor) -> bool:
    """Equal but for rounding, and not because both are zero."""
    tolerance = TOLERANCE.get(full.dtype, LOW_PRECISION_TOLERANCE)
    return bool(full.any()) and float((mine - full).abs().max()) <= tolerance * float(full.abs().max())
