"""A model's own forward as graphs: the steps that follow a site, found by symbolic tracing."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from e2kd.modes import kept_buffers
from e2kd.probe import Turn
from e2kd.sites import Site

ACTIVATIONS: tuple[Any, ...] = (
    F.relu, F.relu6, F.silu, F.gelu, F.elu, F.leaky_relu, F.hardswish, F.mish, F.softplus,
    torch.relu, torch.relu_, torch.sigmoid, torch.tanh, "relu", "relu_", "sigmoid", "tanh",
)  # fmt: skip


class NotTraceable(Exception):
    """The code between the site and the logits can't be followed symbolically."""


def graphs_after(model: nn.Module, site: Site) -> tuple[fx.Graph, fx.Graph | None]:
    """The graph from the explained features to the logits, and the one from the captured tensor to them.

    The second is an activation that a function applies to what the last module returned, None where there is none.

    Raises:
        NotTraceable: where the code between can't be followed.
    """
    graph = _traced(_Logits(model), site.made_by)
    captured = _node_of(graph, site.made_by)
    explained = captured
    while (follower := _only_user(explained)) is not None and follower.target in ACTIVATIONS:
        explained = follower
    (output,) = (node for node in graph.nodes if node.op == "output")
    head = _between(explained, output.args[0])
    return head, None if explained is captured else _between(captured, explained)


def run_graph(model: nn.Module, graph: fx.Graph, features: Tensor) -> Any:
    """What a graph of a model makes of features, by the model's modules as they are now."""
    return fx.Interpreter(_Logits(model), garbage_collect_values=True, graph=graph).run(features)


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
            with _own_forward(root.model), _symbolic_len(root, site.name), kept_buffers(root.modules()):
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
