"""Which layers of a network are compared or shown: its stages, its blocks, or those that were named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from e2kd.errors import UnsupportedModel, check_names
from e2kd.layout import Layout
from e2kd.listening import Place
from e2kd.modes import as_written
from e2kd.probe import Call, Trace, Turn, trace
from e2kd.sites import first_name, is_feature, layout_in, may_be_site, no_map

STEM = 0.1  # share of a network's calls that is its stem
ACTIVATIONS = (nn.ReLU, nn.ReLU6)

BY_FUNCTION = (
    "The features before the ReLU after {layer!r} are wanted, but it is applied by a function and not by a module, so "
    "they can't be heard. Make it an nn.ReLU, or name layers that end before one."
)
TOO_OFTEN = (
    "Expected {layer!r} at most {calls} times, as often as it runs in a forward, but it was named {times} times."
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

    >>> import torch
    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.Conv2d(4, 8, 3, 2), nn.ReLU(), nn.Flatten(),
    ...     nn.Linear(8 * 49, 5))
    >>> layers = Layers(net, torch.rand(2, 3, 32, 32))
    >>> [(s.place.module, s.channels, s.grid) for s in layers.stages()]
    [('1', 4, (15, 15)), ('3', 8, (7, 7))]
    >>> layers.embedding().place.key, layers.embedding().channels
    ('before 5', 392)
    """

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        self.model, self.images = model, images
        with as_written(model):
            self.found: Trace = trace(model, images)
        self._number = {id(c): n for n, c in enumerate(self.found.calls)}
        self._classifier = self._last_with_parameters()
        before = self.found.calls if self._classifier is None else self.found.calls[: self._at_number(self._classifier)]
        usable = (c for c in before if is_feature(c) and may_be_site(c))
        self._maps = [c for c in usable if layout_in(c, self.found, model) is not None]
        self._cuts: dict[int, bool] = {}

    def stages(self, count: int = 4) -> list[Stage]:
        """The outputs of up to `count` stages, first to last.

        A stage ends where the grid changes: of each of the last `count` grids, the last tensor through which alone the
        images reach the logits, that of a whole block or stage where there is one. Networks of one grid, such as ViTs,
        give `count` of their blocks, evenly spaced. The classifier's own maps, of networks that classify every cell and
        then pool, are none.

        Raises:
            UnsupportedModel: when there is none.
        """
        ends = [end for calls in self._by_grid().values() if (end := self._end(calls)) is not None]
        ends.sort(key=self._at_number)  # a grid may appear first in a branch, long before its stage
        if len(ends) == 1 and len(blocks := self._blocks()) > 1:
            count = min(count, len(blocks))
            ends = [blocks[len(blocks) * (n + 1) // count - 1] for n in range(count)]
        if not ends:
            raise UnsupportedModel(
                f"No stages were found in {type(self.model).__name__}: no module returns a map through which alone the "
                "images reach the logits. Name layers through layers= for the student, teacher_layers= for the teacher."
            )
        return [self._stage(call) for call in ends[-count:]]

    def blocks(self) -> list[Stage]:
        """The outputs of the network's repeated blocks, the residual ones of a ResNet or the layers of a ViT; of its
        stages where nothing repeats."""
        return [self._stage(call) for call in self._blocks()] or self.stages()

    def named(self, names: Iterable[str]) -> list[Stage]:
        """The outputs of these modules.

        One that runs several times, as a ReLU for all layers, means its last call; named several times, its last ones
        in their order.

        Raises:
            UnsupportedModel: when a module does not exist, did not run or returns no map, and when one that runs
                several times was named more often than it runs.
            TypeError: for one name in the place of a list.
        """
        check_names(names=names)
        names = [first_name(self.model, name) for name in names]
        left = Counter(names)
        found = []
        for name in names:
            found.append(self._named(name, left[name]))
            left[name] -= 1
        return [self._stage_at(call, self._at(call)) for call in found]

    def at(self, turn: Turn) -> Stage:
        """The output of one call, which is a map."""
        call = self.found.call_at(turn)
        return self._stage_at(call, self._at(call))

    def embedding(self) -> Stage:
        """What enters the classifier, the last layer with parameters: [B, C], or a map where it classifies every cell;
        the last stage's map where it is given neither."""
        call = self._classifier
        given = None if call is None else call.inputs[0]
        if call is not None and isinstance(given, Tensor) and given.ndim == 2:
            return Stage(self._before(call), None, given.shape[1], (1, 1))
        if (
            call is not None
            and isinstance(given, Tensor)
            and given.ndim == 4
            and not isinstance(call.module, nn.Linear)
        ):
            return Stage(self._before(call), Layout("NCHW"), given.shape[1], (given.shape[2], given.shape[3]))
        return self.stages(1)[0]

    def _last_with_parameters(self) -> Call | None:
        """The last layer of parameters that makes a tensor of the batch of another."""
        for call in reversed(self.found.calls):
            given, own = call.inputs[0] if call.inputs else None, next(call.module.parameters(recurse=False), None)
            if own is None or _is_composite(call.module) or call.output is None or not isinstance(given, Tensor):
                continue
            if given.ndim and call.output.ndim and len(given) == len(call.output) == len(self.images):
                return call
        return None

    def _at_number(self, call: Call) -> int:
        """The place of a call among all."""
        return self._number[id(call)]

    def before_activation(self, stages: list[Stage], *, strict: bool = True) -> list[Stage]:
        """The same features before the ReLUs that made them; a stage as it is where none did.

        Raises:
            UnsupportedModel: when a ReLU is no module, unless not `strict`: then the features are those after it.
        """
        return [self._before_activation(stage, strict) for stage in stages]

    def _before_activation(self, stage: Stage, strict: bool) -> Stage:
        output = self.found.output_at(stage.place.turn)
        for call in self.found.calls:
            if call.output is output and call.made and isinstance(call.module, ACTIVATIONS):
                return replace(stage, place=self._before(call))
        made_by = "" if output.grad_fn is None else output.grad_fn.name()
        if strict and not stage.place.copied and made_by.startswith("Relu"):
            raise UnsupportedModel(BY_FUNCTION.format(layer=stage.place.module))
        return stage

    def _by_grid(self) -> dict[tuple[int, int], list[Call]]:
        """The calls past the stem by their grids, in the order in which the grids appear."""
        past = [c for c in self._maps if self._at_number(c) / len(self.found.calls) >= STEM]
        found: dict[tuple[int, int], list[Call]] = {}
        for call in past or self._maps:
            found.setdefault(self._stage(call).grid, []).append(call)
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

    def _named(self, name: str, last: int) -> Call:
        """The call of a module that comes last, second to last, ...; its only one, if it has one."""
        calls = [c for c in self.found.calls if c.name == name]
        if 1 < len(calls) < last:
            raise UnsupportedModel(TOO_OFTEN.format(layer=name, calls=len(calls), times=last))
        call = calls[-min(last, len(calls))] if calls else None
        if call is None or layout_in(call, self.found, self.model) is None:
            others = ", ".join(repr(c.name) for c in self._maps[-3:])
            advice = f"Name a layer with spatial output, for instance {others}."
            raise no_map(self.model, name, None if call is None else call.output, self.found, advice)
        return call

    def _stage(self, call: Call) -> Stage:
        """A call's tensor, heard under the outermost name that returns it."""
        later = self.found.calls[self._at_number(call) :]
        same = [c for c in later if c.output is call.output and c.made and c.name]
        return self._stage_at(call, self._at(min(same, key=lambda c: c.name.count("."))))

    def _stage_at(self, call: Call, place: Place) -> Stage:
        layout = layout_in(call, self.found, self.model)
        assert layout is not None
        assert call.output is not None
        maps = layout.to_maps(call.output, self.found.image_size)
        return Stage(place, layout, maps.shape[1], (maps.shape[2], maps.shape[3]))

    def _at(self, call: Call) -> Place:
        return Place(self.found.turn(call), copied=call.output_changes or self._is_dropped(call.output))

    def _before(self, call: Call) -> Place:
        copied = call.input_changes or self._is_dropped(call.inputs[0])
        return Place(self.found.turn(call), before=True, copied=copied)

    def _is_dropped(self, tensor: Any) -> bool:
        """Whether a dropout changes a tensor in place, which it does in train mode alone."""
        drops = (c for c in self.found.calls if isinstance(c.module, _DropoutNd) and c.module.inplace)
        return any(c.inputs and c.inputs[0] is tensor for c in drops)


def _is_composite(module: nn.Module) -> bool:
    """Whether a module consists of others that have parameters."""
    return any(next(child.parameters(), None) is not None for child in module.children())
