"""Which layers of a network methods compare: its stages, its blocks, or those that were named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from e2kd.errors import UnsupportedModel, shape, unknown_layer
from e2kd.layout import Layout
from e2kd.listening import Place
from e2kd.modes import as_written, evaluating
from e2kd.probe import Call, Trace, trace
from e2kd.sites import is_feature, layout_in, may_be_site

STEM = 0.1  # share of a network's calls that is its stem
ACTIVATIONS = (nn.ReLU, nn.ReLU6)

BY_FUNCTION = (
    "The features before the ReLU after {layer!r} are wanted, but it is applied by a function and not by a module, so "
    "they can't be heard. Make it an nn.ReLU, or name layers that end before one."
)


@dataclass(frozen=True)
class Stage:
    """A tensor with a map, or a vector per image, that is compared.

    Attributes:
        place: where it is heard.
        layout: how to read maps from it; None for vectors [B, C], which count as maps of one cell.
        channels: C.
        grid: (h, w) for the images it was found with.
    """

    place: Place
    layout: Layout | None
    channels: int
    grid: tuple[int, int]

    def maps(self, tensor: Tensor, image_size: tuple[int, int]) -> Tensor:
        """The tensor as maps [B, C, h, w]."""
        return tensor[:, :, None, None] if self.layout is None else self.layout.to_maps(tensor, image_size)


class Layers:
    """A model run once on images, whose layers can then be asked for.

    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.Conv2d(4, 8, 3, 2), nn.ReLU(), nn.Flatten(),
    ...     nn.Linear(8 * 49, 5))
    >>> layers = Layers(net, torch.rand(2, 3, 32, 32))
    >>> [(s.place.module, s.channels, s.grid) for s in layers.stages()]
    [('1', 4, (15, 15)), ('3', 8, (7, 7))]
    >>> layers.embedding()
    Stage(place=Place(module='5', before=True, copied=False), layout=None, channels=392, grid=(1, 1))
    """

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        self.model, self.images = model, images
        with as_written(list(model.modules())):
            self.found: Trace = trace(model, images)
        calls = enumerate(self.found.calls)
        self._order = {id(c): n / len(self.found.calls) for n, c in calls}
        usable = (c for c in self.found.calls if is_feature(c) and may_be_site(c))
        self._maps = [c for c in usable if layout_in(c, self.found, model) is not None]
        self._cuts: dict[int, bool] = {}

    def stages(self, count: int = 4) -> list[Stage]:
        """The outputs of up to `count` stages, first to last.

        A stage ends where the grid changes: of each of the last `count` grids, the last tensor through which alone the
        images reach the logits, that of a whole block or stage where there is one. Networks of one grid, such as ViTs,
        give `count` of their blocks, evenly spaced.

        Raises:
            UnsupportedModel: when there is none.
        """
        ends = [end for calls in self._by_grid().values() if (end := self._end(calls)) is not None]
        if len(ends) == 1 and len(blocks := self._blocks()) > 1:
            count = min(count, len(blocks))
            ends = [blocks[len(blocks) * (n + 1) // count - 1] for n in range(count)]
        if not ends:
            raise UnsupportedModel(
                f"No stages were found in {type(self.model).__name__}: no module returns a map through which alone the "
                "images reach the logits. Name layers through layers= for the student, teacher_layers= for the teacher."
            )
        return self._settled([self._stage(call) for call in ends[-count:]])

    def blocks(self) -> list[Stage]:
        """The outputs of the network's repeated blocks, the residual ones of a ResNet or the layers of a ViT; of its
        stages where nothing repeats."""
        return self._settled([self._stage(call) for call in self._blocks()]) or self.stages()

    def named(self, names: Iterable[str]) -> list[Stage]:
        """The outputs of these modules.

        Raises:
            UnsupportedModel: when a module does not exist, did not run or returns no map.
        """
        return self._settled([self._stage_of(self._named(name)) for name in names])

    def embedding(self) -> Stage:
        """What enters the classifier, [B, C]; the last stage's map where that is no linear layer."""
        for call in reversed(self.found.calls):
            given = call.inputs[0] if call.inputs else None
            if call.output is self.found.logits and isinstance(call.module, nn.Linear) and isinstance(given, Tensor):
                return self._settled([Stage(Place(call.name, before=True), None, given.shape[1], (1, 1))])[0]
        return self.stages(1)[0]

    def before_activation(self, stages: list[Stage], *, strict: bool = True) -> list[Stage]:
        """The same features before the ReLUs that made them; a stage as it is where none did.

        Raises:
            UnsupportedModel: when a ReLU is no module, unless not `strict`: then the features are those after it.
        """
        return self._settled([self._before_activation(stage, strict) for stage in stages])

    def _before_activation(self, stage: Stage, strict: bool) -> Stage:
        output = self.found.output_of(stage.place.module)
        for call in self.found.calls:
            if call.output is output and call.made and isinstance(call.module, ACTIVATIONS):
                return replace(stage, place=Place(call.name, before=True))
        made_by = "" if output.grad_fn is None else output.grad_fn.name()
        if strict and not stage.place.copied and made_by.startswith("Relu"):
            raise UnsupportedModel(BY_FUNCTION.format(layer=stage.place.module))
        return stage

    def _by_grid(self) -> dict[tuple[int, int], list[Call]]:
        """The calls past the stem by their grids, in the order in which the grids appear."""
        past = [c for c in self._maps if self._order[id(c)] >= STEM]
        found: dict[tuple[int, int], list[Call]] = {}
        for call in past or self._maps:
            found.setdefault(self._stage_of(call).grid, []).append(call)
        return found

    def _end(self, calls: Sequence[Call]) -> Call | None:
        """The last cut of a grid: of the outermost modules that consist of others, else of any."""
        whole = [c for c in calls if _is_composite(c.module)]
        for some in sorted({c.name.count(".") for c in whole}):
            level = [c for c in whole if c.name.count(".") == some]
            if (found := self._last_cut(level)) is not None:
                return found
        return self._last_cut(calls)

    def _last_cut(self, calls: Sequence[Call]) -> Call | None:
        return next((c for c in reversed(calls) if self._is_cut(c)), None)

    def _blocks(self) -> list[Call]:
        whole = [c for c in self._maps if _is_composite(c.module) and self._is_cut(c)]
        kinds = Counter(type(c.module) for c in whole if not isinstance(c.module, (nn.Sequential, nn.ModuleList)))
        kind, count = kinds.most_common(1)[0] if kinds else (None, 0)
        return [c for c in whole if type(c.module) is kind] if count > 1 else []

    def _is_cut(self, call: Call) -> bool:
        assert call.output is not None
        key = id(call.output)
        if key not in self._cuts:
            self._cuts[key] = self.found.is_cut(call.output)
        return self._cuts[key]

    def _named(self, name: str) -> Call:
        modules = dict(self.model.named_modules())
        if name not in modules:
            raise unknown_layer(name, modules)
        calls = [c for c in self.found.calls if c.name == name]
        if calls and layout_in(calls[-1], self.found, self.model) is not None:
            return calls[-1]
        came = "did not run" if not calls else "returned no tensor"
        if calls and (output := calls[-1].output) is not None:
            came = f"returned a tensor {shape(output.shape)}, which holds no map of more than one cell"
        others = ", ".join(repr(c.name) for c in self._maps[-3:])
        raise UnsupportedModel(
            f"Layer {name!r} of {type(self.model).__name__} {came}, for images {shape(self.images.shape)}. Name a "
            f"layer with spatial output, for instance {others}."
        )

    def _stage_of(self, call: Call) -> Stage:
        layout = layout_in(call, self.found, self.model)
        assert layout is not None
        assert call.output is not None
        maps = layout.to_maps(call.output, self.found.image_size)
        return Stage(Place(call.name), layout, maps.shape[1], (maps.shape[2], maps.shape[3]))

    def _stage(self, call: Call) -> Stage:
        """The stage of a call, under the outermost name of its tensor."""
        same = [c for c in self.found.calls if c.output is call.output and c.name and c.made]
        return self._stage_of(min([call, *same], key=lambda c: c.name.count(".")))

    def _settled(self, stages: list[Stage]) -> list[Stage]:
        """The stages, those copied whose tensors are changed in place before the forward ends."""
        passed: dict[int, list[tuple[Tensor, int]]] = {n: [] for n in range(len(stages))}

        def listener(n: int) -> Any:
            def hook(module: nn.Module, args: Any, output: Any = None) -> None:
                tensor = stages[n].place.tensor(args if stages[n].place.before else output)
                if tensor is not None:
                    passed[n].append((tensor, tensor._version))

            return hook

        handles: list[Any] = []
        try:
            for n, stage in enumerate(stages):
                module = self.model.get_submodule(stage.place.module)
                register = module.register_forward_pre_hook if stage.place.before else module.register_forward_hook
                handles.append(register(listener(n)))
            with torch.no_grad(), evaluating(self.model), as_written(list(self.model.modules())):
                self.model(self.images)
        finally:
            for handle in handles:
                handle.remove()
        changed = [any(tensor._version != version for tensor, version in passed[n]) for n in range(len(stages))]
        return [replace(s, place=replace(s.place, copied=c)) for s, c in zip(stages, changed, strict=True)]


def _is_composite(module: nn.Module) -> bool:
    """Whether a module consists of others that have parameters."""
    return any(next(child.parameters(), None) is not None for child in module.children())
