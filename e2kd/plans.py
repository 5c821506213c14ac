"""How a model is explained: the site, the head after it and, where it has one, the closed form."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from e2kd.bcos.images import changed_in_place, encoder_of, is_bcos
from e2kd.errors import UnsupportedModel
from e2kd.explainers import Explainer, fixes_weights, reads_images
from e2kd.heads import Head, WholeModel, find_head, find_linear
from e2kd.layout import Layout
from e2kd.modes import dtype_of, kept_buffers, undrawn
from e2kd.narrow import NarrowHead, find_narrow
from e2kd.probe import Trace
from e2kd.sites import Site, find_site

CHANGED = (
    "Expected the output of layer {layer!r} of {name} to stay as it is, but a function changes it in place. Make that "
    "operation inplace=False (x = x + y in place of x += y), or name a layer that ends after it."
)


@dataclass(frozen=True)
class Plan:
    """Where to read in a model and how to take the gradient there.

    Attributes:
        site: the tensor to read; None for explainers of the images themselves.
        head: the rest of the model from there; None when it can only be differentiated in place.
        linear: name of the classifier after average pooling, if the head is just that.
        after: names of the modules that run after the site.
        narrow: the head without its work on tokens that nobody reads, where it has such.
        dynamic: whether the gradient is to be taken with the dynamic weights of a B-cos network held fixed.
        encoder: name of the module inside of such a network that encodes its images; None where they come encoded.
    """

    site: Site | None
    head: Head | None
    linear: str | None
    after: tuple[str, ...] = ()
    narrow: NarrowHead | None = None
    dynamic: bool = False
    encoder: str | None = None

    def maps(self, captured: Tensor, image_size: tuple[int, int]) -> Tensor:
        """The tensor the site holds, as maps [B, C, h, w]."""
        layout = self.site.layout if self.site else Layout("NCHW")
        return layout.to_maps(captured, image_size)

    @property
    def place(self) -> str:
        """Where it reads, in words."""
        return f"layer {self.site.layer!r}" if self.site else "the images"


Key = tuple[object, int, object]
_plans: weakref.WeakKeyDictionary[nn.Module, dict[Key, Plan]] = weakref.WeakKeyDictionary()


def plan_for(model: nn.Module, explainer: Explainer, images: Tensor) -> Plan:
    """The plan for a model, found by running it on two of the images, once for each key.

    Raises:
        UnsupportedModel: when the model can't be explained there.
    """
    known, key = _plans.setdefault(model, {}), _key(model, explainer, images)
    if key not in known:
        for outdated in [k for k in known if k[1] != key[1]]:
            del known[outdated]
        with undrawn(images.device), kept_buffers(model.modules()):
            made = (
                _of_images(model, explainer) if reads_images(explainer) else _make_plan(model, explainer.layer, images)
            )
        known[key] = made
    return known[key]


def _key(model: nn.Module, explainer: Explainer, images: Tensor) -> Key:
    """What a plan depends on: the layer, the model's modules, and the powers of two between which the images' size is.

    Networks halve their maps, so between two powers the same layers hold more than one cell. Explainers of the images
    read no layer, whatever the size; there it is the kind of gradient and the type that it is computed in.
    """
    modules = hash(tuple(map(id, model.modules())))
    if reads_images(explainer):
        return fixes_weights(explainer), modules, dtype_of(model)
    return explainer.layer, modules, (max(images.shape[-2:]) - 1).bit_length()


def _of_images(model: nn.Module, explainer: Explainer) -> Plan:
    dynamic, after = fixes_weights(explainer), tuple(name for name, _ in model.named_modules())
    if dynamic:
        _check_bcos(model, explainer)
    encoder = encoder_of(model) if dynamic else None
    return Plan(None, WholeModel(model), None, after, dynamic=dynamic, encoder=encoder)


def _check_bcos(model: nn.Module, explainer: Explainer) -> None:
    name, how = type(model).__name__, type(explainer).__name__
    if not is_bcos(model):
        raise UnsupportedModel(
            f"{how} explains B-cos networks, and {name} has no B-cos layers. Leave explainers out to have them chosen "
            "for each model, or explain both with GradCAM()."
        )
    if dtype_of(model) in (torch.float16, torch.bfloat16):
        raise UnsupportedModel(
            f"{how} needs float32: in {dtype_of(model)} the dynamic weights of {name} vanish or lose their digits. "
            "Keep parameters in float32 and run the forward under torch.autocast; it is explained in float32 then."
        )
    behind = changed_in_place(model)
    if behind is not None:
        raise UnsupportedModel(
            f"{how} needs what the B-cos layer {behind[0]!r} returns, but {behind[1]!r} changes it in place. Make it "
            "with inplace=False."
        )


def _make_plan(model: nn.Module, layer: str | None, images: Tensor) -> Plan:
    site, found = find_site(model, images[:2], layer)
    head, after = find_head(model, site, found), _after(site, found)
    if site.changes and head is None:
        raise UnsupportedModel(CHANGED.format(layer=site.layer, name=type(model).__name__))
    linear = find_linear(site, head, found)
    return Plan(site, head, linear, after, None if linear else find_narrow(head, site, found, after))


def _after(site: Site, found: Trace) -> tuple[str, ...]:
    names = dict.fromkeys(call.name for call in found.after(site.made_by))
    return tuple(name for name in names if name and not site.made_by.name.startswith(name + "."))
