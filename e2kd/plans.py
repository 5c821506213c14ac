"""How a model is explained: the site, the head after it and, where it has one, the closed form."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

from torch import Tensor, nn

from e2kd.explainers import Explainer, reads_images
from e2kd.heads import Head, WholeModel, find_head, find_linear
from e2kd.layout import Layout
from e2kd.narrow import NarrowHead, find_narrow
from e2kd.probe import Trace
from e2kd.sites import Site, find_site


@dataclass(frozen=True)
class Plan:
    """Where to read in a model and how to take the gradient there.

    Attributes:
        site: the tensor to read; None for explainers of the images themselves.
        head: the rest of the model from there; None when it can only be differentiated in place.
        linear: name of the classifier after average pooling, if the head is just that.
        after: names of the modules that run after the site.
        narrow: the head without its work on tokens that nobody reads, where it has such.
    """

    site: Site | None
    head: Head | None
    linear: str | None
    after: tuple[str, ...] = ()
    narrow: NarrowHead | None = None

    def maps(self, captured: Tensor, image_size: tuple[int, int]) -> Tensor:
        """The tensor the site holds, as maps [B, C, h, w]."""
        layout = self.site.layout if self.site else Layout("NCHW")
        return layout.to_maps(captured, image_size)

    @property
    def place(self) -> str:
        """Where it reads, in words."""
        return f"layer {self.site.layer!r}" if self.site else "the images"


_plans: weakref.WeakKeyDictionary[nn.Module, dict[tuple[str | None, int], Plan]] = weakref.WeakKeyDictionary()


def plan_for(model: nn.Module, explainer: Explainer, images: Tensor) -> Plan:
    """The plan for a model, found by running it on two of the images, once as long as its modules are the same.

    Raises:
        UnsupportedModel: when the model can't be explained there.
    """
    if reads_images(explainer):
        return Plan(None, WholeModel(model), None, tuple(name for name, _ in model.named_modules()))
    known = _plans.setdefault(model, {})
    key = (explainer.layer, hash(tuple(map(id, model.modules()))))
    if key not in known:
        for outdated in [k for k in known if k[1] != key[1]]:
            del known[outdated]
        known[key] = _make_plan(model, explainer.layer, images)
    return known[key]


def _make_plan(model: nn.Module, layer: str | None, images: Tensor) -> Plan:
    site, found = find_site(model, images[:2], layer)
    head, after = find_head(model, site, found), _after(site, found)
    linear = find_linear(site, head, found)
    return Plan(site, head, linear, after, None if linear else find_narrow(head, site, found, after))


def _after(site: Site, found: Trace) -> tuple[str, ...]:
    last = max(n for n, call in enumerate(found.calls) if call.name == site.tensor_of)
    names = dict.fromkeys(call.name for call in found.calls[last + 1 :])
    return tuple(name for name in names if name and not site.tensor_of.startswith(name + "."))
