"""The rest of a model from a site to the logits, as a function that can be run again."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx, nn

from e2kd.modes import as_written, evaluating
from e2kd.outputs import first_tensor, logits_of
from e2kd.probe import Trace, noisy
from e2kd.sharding import is_sharded
from e2kd.sites import Site
from e2kd.tracing import NotTraceable, graphs_after, run_graph

CHANGE = 0.1  # standard deviation of the noise under which a closed form must hold


class _OfModel:
    """Something that belongs to a model without keeping it alive."""

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)

    @property
    def model(self) -> nn.Module:
        """The model, which is alive as long as anybody can ask for its head."""
        model = self._model()
        assert model is not None
        return model

    def follows(self) -> bool:
        """Whether the code after the site can be followed in the model's present mode, train or eval."""
        return True

    def prologue(self, captured: Tensor) -> Tensor:
        """From the captured tensor to the explained one: the same, unless the head begins with a bare activation."""
        return captured

    def explains_another(self) -> bool:
        """Whether the explained tensor is another than the captured one."""
        return False


class TracedHead(_OfModel):
    """The steps of the model's own forward that follow the site, found by symbolic tracing.

    Modules stay opaque and are called on the live model; only the glue between them is replayed. Train and eval
    mode are traced apart, since code such as `F.dropout(x, training=self.training)` differs.
    """

    def __init__(self, model: nn.Module, site: Site) -> None:
        super().__init__(model)
        self.site = site
        self.graphs: dict[bool, tuple[fx.Graph, fx.Graph | None]] = {}
        self._graphs()

    def _graphs(self) -> tuple[fx.Graph, fx.Graph | None]:
        training = self.model.training
        if training not in self.graphs:
            with as_written(self.model):
                self.graphs[training] = graphs_after(self.model, self.site)
        return self.graphs[training]

    def follows(self) -> bool:
        """Train mode may run other code than the eval mode the head was found in."""
        try:
            self._graphs()
        except NotTraceable:
            return False
        return True

    def __call__(self, features: Tensor) -> Tensor:
        """Explained features -> logits [B, K]."""
        return logits_of(run_graph(self.model, self._graphs()[0], features.clone()))  # heads may work in place

    def prologue(self, captured: Tensor) -> Tensor:
        """The activation applied to the captured tensor by a function before anything else (a ReLU after the
        last module, as in torchvision's DenseNet); the tensor itself where there is none."""
        graph = self._graphs()[1]
        if graph is None:
            return captured
        out = run_graph(self.model, graph, captured.clone())
        assert isinstance(out, Tensor)
        return out

    def explains_another(self) -> bool:
        """Where it begins with a bare activation; one in place has changed the captured tensor into the explained."""
        return not self.site.changes and any(activation is not None for _, activation in self.graphs.values())


class ForwardHead(_OfModel):
    """timm's own second half: `forward_head`."""

    def __call__(self, features: Tensor) -> Tensor:
        """Features -> logits [B, K]."""
        return logits_of(self.model.forward_head(features))  # type: ignore[operator]


class WholeModel(_OfModel):
    """The model from its images on, for explainers that read the images."""

    def __call__(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] -> logits [B, K]."""
        return logits_of(self.model(images))


Head = ForwardHead | TracedHead | WholeModel


def find_head(model: nn.Module, site: Site, found: Trace) -> Head | None:
    """A function from the explained features to the logits that reproduces the model's own, or None.

    Tried in turn and kept only if it gives the traced logits: timm's `forward_head`, and the traced rest of forward.
    """
    captured = found.output_at(site.producers[0])
    if captured is found.head_input and _reproduces(head := ForwardHead(model), captured, found):
        return head
    if not site.is_cut:
        return None
    try:
        traced = TracedHead(model, site)
    except NotTraceable:
        return None
    return traced if _reproduces(traced, captured, found) else None


def _reproduces(head: Head, captured: Tensor, found: Trace) -> bool:
    try:
        with torch.no_grad(), evaluating(head.model):
            logits = head(head.prologue(captured.detach().clone()))
    except Exception:  # traced code that needs more than this one tensor may fail in any way
        return False
    return logits.shape == found.logits.shape and torch.allclose(logits, found.logits, rtol=1e-4, atol=1e-5)


def is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a layer computes what the name says, of a weight that it holds.

    fully_shard changes the class; adapters change the forward, of the class or of the layer, or hook it; pruning and
    norms of weights compute them anew.

    >>> is_plain_linear(nn.Linear(2, 2)), is_plain_linear(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
    (True, False)
    """
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward or "forward" in vars(module):
        return False
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return module._parameters.get("weight") is not None and not any(map(_is_foreign, hooks))


def _is_foreign(hook: Any) -> bool:
    """Whether a hook is neither of e2kd nor of torch: it may change what a layer is given and returns."""
    where = getattr(getattr(hook, "func", hook), "__module__", None) or type(hook).__module__
    return where.split(".")[0] not in ("e2kd", "torch")


def find_linear(site: Site, head: Head | None, found: Trace) -> str | None:
    """The name of the classifier of a head that is average pooling and a linear layer, for which CAM has a closed form.

    Found by its numbers: what enters the linear layer that made the logits must be the mean of the maps. That other
    parameters and buffers of the head, as those of a norm, have no effect must hold for all values, not for the first.
    """
    captured = found.output_at(site.producers[0]).detach()
    captured = head.prologue(captured) if head else captured
    maps = site.layout.to_maps(captured, found.image_size)
    for call in reversed(found.calls):
        linear = call.module
        if is_plain_linear(linear) and call.output is not None and call.output.shape == found.logits.shape:
            pooled = first_tensor(call.inputs)
            if pooled is None or pooled.shape != maps.shape[:2] or not torch.equal(call.output, found.logits):
                return None
            is_mean = torch.allclose(pooled, maps.mean((2, 3)), rtol=1e-4, atol=1e-5)
            return call.name if is_mean and _has_no_more(head, site, found, call.name, captured) else None
    return None


def _has_no_more(head: Head | None, site: Site, found: Trace, linear: str, captured: Tensor) -> bool:
    """Whether a head's logits stay what they are when all of its parameters but the classifier's change."""
    model = found.calls[-1].module if head is None else head.model
    path = site.made_by.name.split(".")
    names = {".".join(path[:n]) for n in range(len(path))} | {call.name for call in found.after(site.made_by)}
    others = {name: v for name, v in _own_values(model, names) if name not in (f"{linear}.weight", f"{linear}.bias")}
    if not others:
        return True
    if head is None or any(map(is_sharded, others.values())):
        return False
    running = Running(head.model, head)
    changed = noisy([(f"model.{name}", value) for name, value in others.items()], CHANGE)
    with torch.no_grad(), evaluating(head.model):
        return torch.allclose(torch.func.functional_call(running, changed, (captured,)), found.logits, 1e-4, 1e-5)


def _own_values(model: nn.Module, names: set[str]) -> Iterator[tuple[str, Tensor]]:
    """Floating-point parameters and buffers of these modules, not of those inside of them, by name."""
    for name in sorted(names):
        module = model.get_submodule(name)
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        yield from ((f"{name}.{key}".lstrip("."), value) for key, value in own if value.is_floating_point())


class Running(nn.Module):
    """A function that runs parts of a model, as a module whose parameters can be replaced."""

    def __init__(self, model: nn.Module, run: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.run = model, run

    def forward(self, features: Tensor) -> Tensor:
        """Features -> what the function makes of them."""
        return self.run(features)
