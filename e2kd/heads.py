"""The part of a model from a site to the logits, as a function that can be run again."""

from __future__ import annotations

import inspect
import operator
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from e2kd.modes import as_written, evaluating
from e2kd.outputs import first_tensor, logits_of
from e2kd.probe import Trace, Turn, noisy
from e2kd.sharding import is_sharded
from e2kd.sites import Site

ACTIVATIONS: tuple[Any, ...] = (
    F.relu, F.relu6, F.silu, F.gelu, F.elu, F.leaky_relu, F.hardswish, F.mish, F.softplus,
    torch.relu, torch.relu_, torch.sigmoid, torch.tanh, "relu", "relu_", "sigmoid", "tanh",
)  # fmt: skip


CHANGE = 0.1  # standard deviation of the noise under which a closed form must hold


class NotTraceable(Exception):
    """The code between the site and the logits can't be followed symbolically."""


class _Logits(nn.Module):
    """The model as a function from images to logits alone, so that tracing sees one argument and one result."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Any:
        outputs = self.model(images)
        if isinstance(logits := getattr(outputs, "logits", None), fx.Proxy) and not isinstance(outputs, fx.Proxy):
            return logits
        if isinstance(outputs, dict):
            outputs = tuple(outputs.values())
        if isinstance(outputs, (tuple, list)):
            return next(value for value in outputs if isinstance(value, fx.Proxy))
        return outputs


class _Tracer(fx.Tracer):
    """Looks only into modules that contain the site; every other module is one opaque step.

    Code before the site may branch on its input (a check of type or size). What it computes is thrown away,
    so any answer that leads on to the site will do; code after the site may not branch.
    """

    proxy_buffer_attributes = True

    def __init__(self, site: Turn, answer: bool) -> None:
        super().__init__()
        parts = ["model", *site.name.split(".")]
        self.inside = {".".join(parts[:n]) for n in range(1, len(parts))}
        self.site, self.answer = site, answer

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self.inside

    def to_bool(self, obj: fx.Proxy) -> bool:
        if len(_calls(self.graph, self.site)) > self.site.index:
            raise NotTraceable("the head branches on its values")
        return self.answer


@contextmanager
def _own_forward(model: nn.Module) -> Iterator[None]:
    """The class's forward, without what hosts put in its place (autocast wrappers)."""
    patched = model.__dict__.pop("forward", None)
    try:
        yield
    finally:
        if patched is not None:
            model.__dict__["forward"] = patched


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
                self.graphs[training] = _split(_Logits(self.model), self.site)
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
        return logits_of(_run(self.model, self._graphs()[0], features.clone()))  # heads may work in place

    def prologue(self, captured: Tensor) -> Tensor:
        """The activation applied to the captured tensor by a function before anything else (a ReLU after the
        last module, as in torchvision's DenseNet); the tensor itself where there is none."""
        graph = self._graphs()[1]
        if graph is None:
            return captured
        out = _run(self.model, graph, captured.clone())
        assert isinstance(out, Tensor)
        return out


def _run(model: nn.Module, graph: fx.Graph, features: Tensor) -> Any:
    return fx.Interpreter(_Logits(model), garbage_collect_values=True, graph=graph).run(features)


def _split(root: _Logits, site: Site) -> tuple[fx.Graph, fx.Graph | None]:
    """The graph from the explained features to the logits, and the one from the captured tensor to them."""
    graph = _traced(root, site.made_by)
    captured = _node_of(graph, site.made_by)
    explained = captured
    while (follower := _only_user(explained)) is not None and follower.target in ACTIVATIONS:
        explained = follower
    (output,) = (node for node in graph.nodes if node.op == "output")
    head = _between(explained, output.args[0])
    return head, None if explained is captured else _between(captured, explained)


def _len(value: Any) -> Any:
    """`len` that also counts symbolic values."""
    if isinstance(value, fx.Proxy):
        return value.tracer.create_proxy("call_function", len, (value,), {})
    return len(value)


@contextmanager
def _symbolic_len(root: _Logits, layer: str) -> Iterator[None]:
    """`len(x)` in the forwards that are looked into becomes a step like any other, as torch.fx.wrap("len") does."""
    modules = [root.model.get_submodule(".".join(layer.split(".")[:n])) for n in range(layer.count(".") + 1)]
    spaces = [vars(inspect.getmodule(type(m)) or inspect) for m in modules]
    patched = [
        space for space in {id(s): s for s in spaces}.values() if "len" not in space and space is not vars(inspect)
    ]
    for space in patched:
        space["len"] = _len
    try:
        yield
    finally:
        for space in patched:
            del space["len"]


def _traced(root: _Logits, site: Turn) -> fx.Graph:
    root.training = root.model.training
    reasons = []
    for answer in (False, True):
        try:
            with _own_forward(root.model), _symbolic_len(root, site.name):
                return _Tracer(site, answer).trace(root)
        except Exception as error:  # code may refuse symbolic values in any way; find_head then returns no head
            reasons.append(f"{type(error).__name__}: {error}")
    raise NotTraceable(reasons[0])


def _only_user(node: fx.Node) -> fx.Node | None:
    users = [user for user in node.users if user.op in ("call_function", "call_method")]
    return users[0] if len(node.users) == 1 and users else None


def _calls(graph: fx.Graph, site: Turn) -> list[fx.Node]:
    """The steps that call the site's module."""
    return [node for node in graph.nodes if node.op == "call_module" and node.target == f"model.{site.name}"]


def _node_of(graph: fx.Graph, site: Turn) -> fx.Node:
    calls = _calls(graph, site)
    if len(calls) != site.count:  # some are inside of opaque modules, or in the other mode
        raise NotTraceable(f"{site.name} is called {len(calls)} times, and was {site.count} times when it was found")
    call = calls[site.index]
    items: list[fx.Node] = [user for user in call.users if user.target is operator.getitem and user.args[1] == 0]
    return items[0] if items and len(call.users) == len(items) else call


def _between(start: fx.Node, end: Any) -> fx.Graph:
    """The graph that computes `end` (a node or a structure of nodes) from `start`."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {start: graph.placeholder("features")}

    def copy(node: fx.Node) -> fx.Node:
        if node not in copies:
            if node.op == "placeholder" or (node.op == "call_module" and not _depends(node, start)):
                raise NotTraceable(f"the head also needs {node.name}, which comes from before the site")
            for argument in node.all_input_nodes:
                copy(argument)
            copies[node] = graph.node_copy(node, copies.__getitem__)
        return copies[node]

    needed: list[fx.Node] = []

    def note(node: fx.Node) -> fx.Node:
        needed.append(node)
        return node

    fx.node.map_arg(end, note)
    for node in needed:
        copy(node)
    graph.output(fx.node.map_arg(end, copies.__getitem__))
    return graph


def _depends(node: fx.Node, start: fx.Node) -> bool:
    """Whether a node is computed from `start`, or from no input at all."""
    open_nodes, seen, from_images = [node], set(), False
    while open_nodes:
        current = open_nodes.pop()
        if current is start:
            return True
        from_images |= current.op == "placeholder"
        new = [n for n in current.all_input_nodes if n not in seen]
        seen.update(new)
        open_nodes.extend(new)
    return not from_images


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


def _is_linear(module: nn.Module) -> bool:
    """A linear layer that computes what its name says: fully_shard changes the class, adapters the forward."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


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
        if _is_linear(linear) and call.output is not None and call.output.shape == found.logits.shape:
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
    others = dict(_own_values(model, names - {linear}))
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
