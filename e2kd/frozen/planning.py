"""The plan of a cache: everything that decides its bytes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any

from torch import Tensor, nn

from e2kd.choosing import KNOWN, explainer_named
from e2kd.explainers import KINDS, BcosContributions, BcosWeights, Explainer
from e2kd.frozen.asking import Asked
from e2kd.frozen.fingerprints import hash_ids, hash_weights
from e2kd.frozen.looks import thumbnail
from e2kd.frozen.records import Record
from e2kd.frozen.samples import class_names_of, transformed
from e2kd.frozen.sources import Source
from e2kd.modes import dtype_of, timm_configuration
from e2kd.plans import plan_for

ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")  # of an object in this process


def plan_of(
    asked: Asked, source: Source, example: Tensor, record: Record, shard_rows: int, batch_size: int, *, given: bool
) -> dict[str, Any]:
    """What is frozen and how, as JSON holds it; `example` is a canonical image [C, H, W]."""
    return {
        "teacher": teacher_of(asked),
        "explainer": explainer_of(asked, example),
        "classes": asked.classes,
        "view": source.view.to_json() | {"image": list(example.shape), "type": str(example.dtype).split(".")[-1]},
        "dataset": {
            "samples": len(source),
            "ids": "pixels" if source.hashes is None else "given" if given else "names",
            "ids_hash": None if source.hashes is None else hash_ids(source.hashes),
            "class_names": class_names_of(source.dataset),
            "transformed": transformed(source.dataset),
        },
        "record": record.to_json(),
        "shard_rows": shard_rows,
        "batch_size": batch_size,
        "first_image": thumbnail(example).tolist(),
    }


def teacher_of(asked: Asked) -> dict[str, Any]:
    """The teacher: its name, its weights' hash, and how it is given the images."""
    size = asked.teacher.size
    return {
        "name": name_of(asked.model),
        "weights": hash_weights(asked.model),
        "type": str(dtype_of(asked.model)).split(".")[-1],
        "normalization": asked.normalization,
        "size": None if size is None else list(size),
    }


def name_of(model: nn.Module) -> str:
    """timm's name of a model, else its class."""
    return str(timm_configuration(model).get("architecture") or type(model).__name__)


def explainer_of(asked: Asked, example: Tensor) -> dict[str, Any] | None:
    """The explainer, the layer it reads in this teacher, and the size to which maps were averaged."""
    explainer: Explainer | None = asked.explainer
    if explainer is None:
        return None
    images = asked.teacher.prepared(asked.prepared(example[None].expand(2, -1, -1, -1)))
    site = plan_for(asked.model, explainer, images).site
    resolution: dict[str, Any] = {}
    if isinstance(explainer, (BcosWeights, BcosContributions)):
        resolution["resolution"] = explainer.resolution
    return resolution | {
        "name": _kind_of(explainer),
        "settings": settings_of(explainer),
        "layer": None if site is None else site.layer,
        "map_size": list(asked.map_size),
    }


def _kind_of(explainer: Explainer) -> str:
    """What a cache calls an explainer: one of the user's own does not get the name of one of e2kd's."""
    kind = type(explainer)
    return f"own {kind.__qualname__}" if kind.__name__ in KNOWN and kind not in KINDS else kind.__name__


def settings_of(explainer: Explainer) -> str:
    """What tells an explainer from others of its class, whichever process says it.

    >>> class Power:
    ...     layer = None
    ...     def __init__(self, exponent): self.exponent = exponent
    ...     def __call__(self, features, gradient): return (features * gradient).sum(1, keepdim=True) ** self.exponent
    >>> settings_of(Power(2))
    'Power(exponent=2)'
    """
    if is_dataclass(explainer):
        said = repr(explainer)
    else:
        settings = ", ".join(f"{name}={value!r}" for name, value in getattr(explainer, "__dict__", {}).items())
        said = f"{type(explainer).__qualname__}({settings})"
    return ADDRESS.sub("", said)


def explainer_said(said: Mapping[str, Any]) -> Explainer:
    """The explainer that a cache's plan names, with the layer or the resolution that it says.

    >>> explainer_said({"name": "BcosWeights", "layer": None, "resolution": [28, 28]})
    BcosWeights(resolution=(28, 28), passes=None)
    """
    if "resolution" not in said:
        return explainer_named(said["name"], said["layer"])
    size = said["resolution"]
    explainer: Explainer = KNOWN[said["name"]](tuple(size) if isinstance(size, list) else size)
    return explainer
