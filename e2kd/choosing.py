"""Which explainer: by its name, by the kind of network, and beside that of the other network."""

from __future__ import annotations

from typing import Any

from torch import nn

from e2kd.bcos.images import is_bcos
from e2kd.explainers import (
    KINDS,
    BcosContributions,
    BcosWeights,
    Explainer,
    GradCAM,
    fixes_weights,
    is_signed,
    reads_images,
)

KNOWN: dict[str, type[Any]] = {kind.__name__: kind for kind in KINDS}  # as caches name them
NAMED = {name.lower(): kind for name, kind in KNOWN.items()}  # as command lines do


def explainer_named(name: str, layer: str | None = None) -> Explainer:
    """One of e2kd's explainers by its name on a command line or in a cache.

    Raises:
        ValueError: for another name, or a layer for one that reads the images.

    >>> explainer_named("gradcam", "layer4")
    GradCAM(layer='layer4')
    """
    kind = NAMED.get(name, KNOWN.get(name))
    if kind is None:
        raise ValueError(f"Expected an explainer of e2kd: {', '.join(NAMED)}, but got {name!r}.")
    if layer is None:
        explainer: Explainer = kind()
    elif getattr(kind, "reads_images", False):
        raise ValueError(f"{kind.__name__} reads no layer, but layer {layer!r} was given. Leave it out.")
    else:
        explainer = kind(layer)
    return explainer


def explainers_asked(
    name: str | None, layer: str | None, teacher_layer: str | None
) -> tuple[Explainer, Explainer] | tuple[None, None]:
    """The explainers of student and teacher by a command line's options: GradCAM for a layer alone, None for none.

    >>> explainers_asked(None, "layer4", None), explainers_asked("cam", None, "stages.3")
    ((GradCAM(layer='layer4'), GradCAM(layer=None)), (CAM(layer=None), CAM(layer='stages.3')))
    """
    if not (name or layer or teacher_layer):
        return None, None
    kind = name or "gradcam"
    return explainer_named(kind, layer or None), explainer_named(kind, teacher_layer or None)


def default_explainer(model: object) -> Explainer:
    """`BcosWeights()` for a B-cos network, else `GradCAM()`.

    >>> default_explainer(nn.Linear(2, 2))
    GradCAM(layer=None)
    """
    return BcosWeights() if isinstance(model, nn.Module) and is_bcos(model) else GradCAM()


def explainers_of(
    student: nn.Module, teacher: object, own: Explainer | None, theirs: Explainer | None
) -> tuple[Explainer, Explainer]:
    """The explainers of student and teacher, chosen where they are None so that their maps can be compared.

    W(x) has the channels of the encoded images and GradCAM one; so beside the GradCAM of the other network, a
    B-cos network is explained by its contributions.

    >>> from e2kd.bcos import BcosLinear
    >>> explainers_of(BcosLinear(4, 2), nn.Linear(4, 2), None, None)
    (BcosContributions(resolution=14, passes=None), GradCAM(layer=None))
    """
    if own is not None:
        return own, theirs or own
    mine = default_explainer(student)
    if theirs is not None:
        return mine, theirs
    other = default_explainer(teacher)
    if fixes_weights(mine) == fixes_weights(other):
        return mine, other
    return (BcosContributions(), other) if fixes_weights(mine) else (mine, BcosContributions())


def explainer_beside(student: nn.Module, cached: Explainer) -> Explainer:
    """The student's explainer for maps that a cache holds: the one that made them; for a network of the other kind the
    one that `explainers_of` would choose beside it, where there is one. B-cos networks have no other signed maps of
    one channel than `CAM`.

    >>> explainer_beside(nn.Linear(2, 2), BcosContributions())
    GradCAM(layer=None)
    """
    if isinstance(cached, BcosContributions) and not is_bcos(student):
        return GradCAM()
    if is_bcos(student) and not is_signed(cached) and not fixes_weights(cached) and not reads_images(cached):
        return BcosContributions()
    return cached
