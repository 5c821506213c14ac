"""Where in a model an explanation reads: the tensor that holds the last map on the way to the logits."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import Tensor, nn

from e2kd.errors import UnsupportedModel, shape, unknown_layer
from e2kd.layout import Layout, layout_of
from e2kd.probe import Call, Trace, Turn, trace

ALIVE = 0.5  # share of a map's cells that must have a gradient
EARLY = 0.25  # share of a network's calls that is too little for its features to explain it
JITTER = 0.02
POOL = re.compile(r"Pool(ing)?(2d)?$")
NO_GRAPH = (
    "{name} returns logits without a graph, so they can't be explained: its forward switches gradients off "
    "(torch.no_grad, torch.inference_mode, detach). Pass the network inside of it."
)


@dataclass(frozen=True)
class Site:
    """A tensor inside a model, known by the calls that pass it on.

    Attributes:
        layer: the module people would name, whose output the tensor is; one that runs once, if there is one.
        producers: every call that makes this very tensor, outermost first.
        consumers: calls that are given this very tensor, and as which argument.
        made_by: the outermost producer that returns it bare, or first in a tuple.
        layout: how to read maps from it.
        is_cut: whether the logits depend on the images through it alone, so that a replay from it is exact.
        image_size: (H, W) of the images it was found on.
        grid: (h, w) of its maps there.
        beside: where it is not, the last module with a map through which they also depend on the images.
        changes: whether a function changes it in place after that.
    """

    layer: str
    producers: tuple[Turn, ...]
    consumers: tuple[tuple[Turn, int], ...]
    made_by: Turn
    layout: Layout
    is_cut: bool
    image_size: tuple[int, int]
    grid: tuple[int, int]
    beside: str | None = None
    changes: bool = False

    def heard_by_name(self) -> str:
        """The layer, where a hook on it hears this very tensor.

        Raises:
            UnsupportedModel: for a module that runs several times in one forward.
        """
        if Turn(self.layer) not in self.producers:
            raise UnsupportedModel(
                f"Expected a module that runs once in a forward, but {self.layer!r}, which makes the last map, runs "
                "several times. Give each place a module of its own, or name another layer."
            )
        return self.layer

    def may_be_one_cell(self, image_size: tuple[int, int]) -> bool:
        """Whether images of a size (H, W) may be too small for it; paddings are not known."""
        sizes = zip(image_size, self.image_size, self.grid, strict=True)
        return all(new * cells < 2 * old for new, old, cells in sizes)


def find_site(model: nn.Module, images: Tensor, layer: str | None = None) -> tuple[Site, Trace]:
    """The site to explain at, and a trace of the model.

    Without a name: what timm's `forward_head` is given, if every patch has a gradient there; else the last
    tensor with a grid through which alone the images reach the logits and where most cells have a gradient.
    That is the input of the pooling for convolutional networks and the input of the last block for
    transformers that read a class token, where the patch tokens of the last output have none. Networks that
    carry their patches in several tensors at once, or read several stages, have no such tensor past their first
    quarter: there it is the last map with a gradient, `Site.is_cut` is False, and the map tells of the paths through
    it, as in any CAM library.

    Raises:
        UnsupportedModel: when there is no such tensor, or the named layer does not exist, has no map or no gradient.
    """
    plain = found = trace(model, images)
    if not found.logits.requires_grad:
        raise UnsupportedModel(NO_GRAPH.format(name=type(model).__name__))
    if not any(_alive(call, found, model) for call in found.calls):  # a zero-initialised head hides every gradient
        found = trace(model, images, jitter=JITTER)
    call = _search(model, found) if layer is None else _named(model, found, layer)
    return _site(model, found, call), plain


def layout_in(call: Call, found: Trace, model: nn.Module) -> Layout | None:
    """The layout of a call's output, if it is a map over the batch."""
    if call.output is None or call.output.shape[:1] != found.images.shape[:1]:
        return None
    order = "NHWC" if str(getattr(model, "output_fmt", "NCHW")).endswith("NHWC") else "NCHW"
    prefix = getattr(model, "num_prefix_tokens", None)
    known = prefix if isinstance(prefix, int) else None
    shape = tuple(call.output.shape)
    layout = layout_of(shape, found.image_size, order, known, convolved=shape in found.convolved)
    return None if layout is not None and _pools(call, layout, found) else layout


def _pools(call: Call, layout: Layout, found: Trace) -> bool:
    """Whether a module made tokens of a map whose cells they can't be: no such number of cells fits the map's sides.

    Clusters, parts or channels of a pooling may be a square number as well.
    """
    if layout.found is None:
        return False
    grid = layout.found[:2]
    given = [_sides(x) for x in call.inputs if isinstance(x, Tensor) and x.ndim == 4 and x.shape != found.images.shape]
    if not given or any(_fits(grid, sides) for each in given for sides in each):
        return False
    inside = (c.output for c in found.calls if c.name.startswith(f"{call.name}.") and c.output is not None)
    return not any(grid in _sides(x) for x in inside if x.ndim == 4)


def _sides(x: Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
    """(h, w) of [B, C, h, w] and of [B, h, w, C]."""
    return (x.shape[2], x.shape[3]), (x.shape[1], x.shape[2])


def _fits(grid: tuple[int, int], sides: tuple[int, int]) -> bool:
    """Whether as many patches, each of as many cells, cover a map, or the map's cells such a grid.

    >>> _fits((7, 7), (14, 14)), _fits((8, 8), (14, 14))
    (True, False)
    """
    return all(mine % whole == 0 or whole % mine == 0 for whole, mine in zip(grid, sides, strict=True))


def _alive(call: Call, found: Trace, model: nn.Module) -> bool:
    """Whether the output is a map most of whose cells have a gradient."""
    layout = layout_in(call, found, model)
    if layout is None or call.gradient is None:
        return False
    return share_alive(layout.to_maps(call.gradient, found.image_size)) >= ALIVE


def share_alive(gradient: Tensor) -> float:
    """Share of the cells of [B, C, h, w] where any channel is not zero.

    >>> import torch
    >>> share_alive(torch.tensor([[[[0., 1.]], [[0., 2.]]]]))
    0.5
    """
    return (gradient != 0).any(1).double().mean().item()


def _search(model: nn.Module, found: Trace) -> Call:
    at_head = [c for c in found.calls if c.output is not None and c.output is found.head_input]
    if at_head and _alive(at_head[-1], found, model):
        return at_head[-1]
    calls = [c for c in reversed(found.calls) if may_be_site(c)]
    cut = next((c for c in calls if _alive(c, found, model) and c.output is not None and found.is_cut(c.output)), None)
    if cut is not None and not _is_early(cut, found):
        return cut
    last = next((c for c in calls if is_feature(c) and _alive(c, found, model)), cut)
    if last is not None:
        return last
    raise UnsupportedModel(
        f"{type(model).__name__} has no layer that holds a map with a gradient, so there is no layer to choose "
        f"for you. {suggest(model, found)}"
    )


def _is_early(call: Call, found: Trace) -> bool:
    """Whether most of the network comes after a call, so that its output shows edges and not yet what is seen."""
    return next(i for i, c in enumerate(found.calls) if c.output is call.output) < EARLY * len(found.calls)


def is_feature(call: Call) -> bool:
    """Whether a call returns features; dropouts and softmaxes return attention weights, which only look like maps."""
    return call.made and not isinstance(call.module, (nn.Dropout, nn.Softmax))


def may_be_site(call: Call) -> bool:
    """Whether a call's output may be explained: not a pool's, which is blurred, nor a bare linear layer's in a head."""
    return bool(call.name) and not isinstance(call.module, nn.Linear) and not POOL.search(type(call.module).__name__)


def suggest(model: nn.Module, found: Trace) -> str:
    """A sentence with layers that could be named by hand."""
    names = [call.name for call in reversed(found.calls) if may_be_site(call) and _alive(call, found, model)]
    if not names:
        return "No module of it returns a map with a gradient, so its logits can't be explained by a layer."
    return f"Name one through layer=, for instance {', '.join(repr(n) for n in dict.fromkeys(names[:3]))}."


def first_name(model: nn.Module, layer: str) -> str:
    """The name under which a trace has a layer: a module that others share has several.

    Raises:
        UnsupportedModel: when there is no such layer.

    >>> act = nn.ReLU()
    >>> first_name(nn.Sequential(nn.Linear(2, 2), act, act), "2")
    '1'
    """
    modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    if layer not in modules:
        raise unknown_layer(layer, modules)
    names: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}
    return names[modules[layer]]


def no_map(model: nn.Module, layer: str, output: Tensor | None, found: Trace, advice: str) -> UnsupportedModel:
    """The error for a layer whose output holds no map; None is that of one that did not run."""
    came = "did not run, or returned no tensor,"
    if output is not None:
        came = f"returned a tensor {shape(output.shape)}, which holds no map of more than one cell,"
    return UnsupportedModel(
        f"Layer {layer!r} of {type(model).__name__} {came} for images {shape(found.images.shape)}. {advice}"
    )


def _named(model: nn.Module, found: Trace, layer: str) -> Call:
    name = first_name(model, layer)
    calls = [call for call in found.calls if call.name == name]
    call = next((c for c in reversed(calls) if layout_in(c, found, model)), calls[-1] if calls else None)
    if call is None or layout_in(call, found, model) is None:
        raise no_map(model, layer, None if call is None else call.output, found, suggest(model, found))
    if call.gradient is None or not _has_gradient(call, found, model):
        raise UnsupportedModel(
            f"The logits have no gradient with respect to the map of layer {layer!r}, as after the last token mixing "
            f"of a class-token transformer. {suggest(model, found)}"
        )
    return call


def _has_gradient(call: Call, found: Trace, model: nn.Module) -> bool:
    layout = layout_in(call, found, model)
    return (
        layout is not None and call.gradient is not None and bool(layout.to_maps(call.gradient, found.image_size).any())
    )


def _site(model: nn.Module, found: Trace, call: Call) -> Site:
    layout = layout_in(call, found, model)
    assert call.output is not None
    assert layout is not None
    maps = layout.to_maps(call.output, found.image_size)
    same = [c for c in reversed(found.calls) if c.output is call.output and c.bare and c.name]
    bare = [found.turn(c) for c in same if c.made] or [found.turn(call)]
    return Site(
        layer=next((turn for turn in bare if turn.count == 1), bare[0]).name,
        producers=tuple(found.producers(call.output)) or (found.turn(call),),
        consumers=tuple(found.consumers(call.output)),
        made_by=bare[0],
        layout=layout,
        is_cut=found.is_cut(call.output),
        image_size=found.image_size,
        grid=(maps.shape[-2], maps.shape[-1]),
        beside=_beside(model, found, call.output),
        changes=found.call_at(bare[0]).output_changes,
    )


def _beside(model: nn.Module, found: Trace, tensor: Tensor) -> str | None:
    """The outermost name of the last map on a way around a tensor."""
    if found.is_cut(tensor):
        return None
    maps = [c for c in found.around(tensor) if is_feature(c) and may_be_site(c) and layout_in(c, found, model)]
    return next((turn.name for c in maps[-1:] if c.output is not None for turn in found.producers(c.output)), None)
