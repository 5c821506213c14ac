"""What a model's layers hold for a batch of images: one forward, no gradients, nothing left behind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from e2kd.distance import distance_matrix
from e2kd.errors import check_batch_size, check_names
from e2kd.explainers import GradCAM
from e2kd.listening import Place, convolving, hearing
from e2kd.modes import as_computed, as_written, dtype_of, evaluating, kept_buffers, unwrap
from e2kd.outputs import logits_of
from e2kd.plans import plan_for
from e2kd.probe import Call, Trace, Turn
from e2kd.similarity import at_least_float32
from e2kd.sites import first_name, layout_in, no_map


@dataclass(frozen=True)
class LayerReading:
    """One layer's maps and how far apart the images are in it.

    Attributes:
        layer: name of the module.
        maps: its output [n, C, h, w], at least float32; of tokens the patch grid, without class and register tokens.
        distances: between the images, [n, n] float64.
        pooled: whether they are distances of the maps' means over space, [n, C], or of the maps, [n, C h w].
    """

    layer: str
    maps: Tensor
    distances: Tensor
    pooled: bool = False

    @property
    def means(self) -> Tensor:
        """The maps averaged over space, [n, C] float64."""
        return _means(self.maps)

    @property
    def features(self) -> Tensor:
        """What the distances are between: [n, C h w], or the means over space [n, C]."""
        return self.means if self.pooled else self.maps.flatten(1)

    def of(self, rows: Tensor) -> LayerReading:
        """The reading of some of the images, by their indices."""
        rows = rows.to(self.maps.device)
        return LayerReading(self.layer, self.maps[rows], self.distances[rows][:, rows], self.pooled)


@dataclass(frozen=True)
class Reading:
    """What a model makes of images: its logits [n, K], and its layers in the order they were asked for.

    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    >>> found = read(model, torch.rand(6, 3, 8, 8), ["0", "1"])
    >>> [(x.layer, tuple(x.maps.shape), tuple(x.distances.shape)) for x in found.layers]
    [('0', (6, 4, 6, 6), (6, 6)), ('1', (6, 4, 6, 6), (6, 6))]
    """

    logits: Tensor
    layers: tuple[LayerReading, ...]
    image_size: tuple[int, int]

    @property
    def count(self) -> int:
        """Images read, n."""
        return len(self.logits)

    def of(self, rows: Tensor) -> Reading:
        """The reading of some of the images, by their indices."""
        return Reading(
            self.logits[rows.to(self.logits.device)], tuple(x.of(rows) for x in self.layers), self.image_size
        )


def read(
    model: nn.Module,
    images: Tensor,
    layers: Sequence[str] | None = None,
    *,
    pooled: bool = False,
    batch_size: int | None = None,
    eps: float = 0.0,
) -> Reading:
    """Read any layers of a model in one forward pass, in eval mode, in full precision and without gradients.

    The model's modes, gradients, buffers and hooks stay as they were.

    Args:
        model: any image classifier.
        images: [n, C, H, W], as the model expects them.
        layers: names of modules whose output is a map [n, C, h, w], [n, h, w, C] or tokens [n, t, C]; None is the one
            an explanation reads.
        pooled: measure distances between the maps' means over space.
        batch_size: images per forward; None is all of them.
        eps: see `distance_matrix`.

    Raises:
        UnsupportedModel: when a layer does not exist, did not run or holds no map.
        TypeError: for the name of one layer in the place of a list.
        ValueError: for a batch size that is no count.
    """
    check_names(layers=layers)
    check_batch_size(batch_size)
    model = unwrap(model)
    images = as_computed(model, images.detach())
    with torch.inference_mode(False):
        images = images.clone() if images.is_inference() else images
        names = [_default(model, images)] if layers is None else list(layers)
        found = [_forward(model, batch, names) for batch in images.split(batch_size or len(images))]
        maps = [_joined([part[1][name] for part in found]) for name in names]
        readings = [_measure(name, m, pooled, eps) for name, m in zip(names, maps, strict=True)]
    return Reading(_joined([part[0] for part in found]), tuple(readings), (images.shape[-2], images.shape[-1]))


def _default(model: nn.Module, images: Tensor) -> str:
    with torch.enable_grad(), evaluating(model), as_written(model):
        site = plan_for(model, GradCAM(), images.to(dtype_of(model))).site
    assert site is not None
    return site.heard_by_name()


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _means(maps: Tensor) -> Tensor:
    """Means over space [n, C] float64, of rows summed in the maps' own type: no float64 copy of the maps."""
    return maps.sum(3).double().sum(2) / (maps.shape[2] * maps.shape[3])


def _measure(name: str, maps: Tensor, pooled: bool, eps: float) -> LayerReading:
    features = _means(maps) if pooled else maps.flatten(1)
    return LayerReading(name, maps, distance_matrix(features, eps=eps), pooled)


def _forward(model: nn.Module, images: Tensor, names: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and the named layers' maps, copied: a later module may change the tensor in place."""
    places = {name: Place(Turn(first_name(model, name)), copied=True) for name in names}
    with (
        torch.no_grad(),
        torch.autocast(images.device.type, enabled=False),
        evaluating(model),
        as_written(model),
        kept_buffers(model.modules()),
        convolving(model) as convolved,
        hearing(model, set(places.values())) as heard,
    ):
        logits = logits_of(model(images))
    found = Trace(images, logits, convolved=convolved)
    return at_least_float32(logits), {
        name: _maps(model, name, heard.get(place.key), found) for name, place in places.items()
    }


def _maps(model: nn.Module, name: str, output: Tensor | None, found: Trace) -> Tensor:
    """A layer's output as maps [n, C, h, w]."""
    layout = None if output is None else layout_in(Call(name, model.get_submodule(name), (), output), found, model)
    if output is None or layout is None:
        raise no_map(model, name, output, found, "Name one with spatial output through layers=.")
    return at_least_float32(layout.to_maps(output, found.image_size)).contiguous()
