"""The models of the coverage sweep: one small classifier of each family, with random weights and 10 classes."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from torch import Tensor, nn

from e2kd.modes import timm_configuration
from e2kd.outputs import logits_of

CLASSES = 10
SIZES = (64, 96, 112, 128, 160, 192, 224, 240, 256, 288, 299, 320, 384)
MODERATE = 192  # an input size to be content with
CELLS = 9  # of the last grid, at least
LARGE = 40_000_000  # parameters from which fewer blocks are asked for
DEPTH = 4
CANDIDATES = 6


class NoClassifier(Exception):
    """A family without a model that gives logits [B, 10]; the message says what they give instead."""


@dataclass
class Subject:
    """A model under test and how it was made."""

    family: str
    name: str
    size: int
    build: Callable[[], nn.Module]
    options: dict[str, Any] = field(default_factory=dict)


def timm_families() -> list[str]:
    """Every module of timm that holds models."""
    return sorted(timm.list_modules())


def timm_subject(family: str) -> Subject:
    """The classifier of a timm module with the fewest parameters, at the smallest size that leaves 9 cells.

    Of models that need large images the one that needs the smallest is taken.

    Raises:
        NoClassifier: when none of the smallest models returns logits [B, 10].
    """
    refusals, found = [], []
    for name in _by_parameters(family)[:CANDIDATES]:
        try:
            found.append(_smallest_input(family, name))
        except NoClassifier as error:
            refusals.append(f"{name}: {error}")
            continue
        if found[-1].size <= MODERATE:
            break
    if not found:
        raise NoClassifier("; ".join(refusals))
    return min(found, key=lambda subject: subject.size)


def timm_named(family: str, name: str, size: int, options: dict[str, Any]) -> Subject:
    """A timm model chosen before."""
    return Subject(
        family, name, size, functools.partial(timm.create_model, name, num_classes=CLASSES, **options), options
    )


def _by_parameters(family: str) -> list[str]:
    """Names of a module's models, from few parameters to many, models of smaller images first."""
    found = []
    for name in timm.list_models(module=family):
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=CLASSES)
        found.append((sum(p.numel() for p in model.parameters()), _own_size(model), name))
    return [name for _, _, name in sorted(found)]


def _own_size(model: nn.Module) -> int:
    return int(timm_configuration(model).get("input_size", (3, 224, 224))[-1])


def _smallest_input(family: str, name: str) -> Subject:
    """The first size that runs and leaves enough cells; the model's own size when the features don't tell."""
    refusal = "no size runs"
    with torch.device("meta"):
        own = _own_size(timm.create_model(name, num_classes=CLASSES))
    for size, enough in [*((s, CELLS) for s in SIZES), (own, 0)]:
        for options in _options(name, size):
            build = functools.partial(timm.create_model, name, num_classes=CLASSES, **options)
            try:
                cells = _trial(build, size)
            except NoClassifier:
                raise
            except Exception as error:  # how a model refuses an option or a size is its own affair
                refusal = f"{type(error).__name__}: {str(error)[:120]}"
                continue
            if cells >= enough:
                return timm_named(family, name, size, options)
            break
    raise NoClassifier(refusal)


def _trial(build: Callable[[], nn.Module], size: int) -> int:
    """Cells of the last grid of a model that runs at this size.

    Raises:
        NoClassifier: when it runs but returns no logits.
    """
    model, images = build().eval(), torch.zeros(2, 3, size, size)
    with torch.no_grad():
        outputs = model(images)
        if not _is_logits(outputs):
            raise NoClassifier(f"returns {_say(outputs)}")
        return _cells(model, images)


def _options(name: str, size: int) -> Iterator[dict[str, Any]]:
    """Keyword arguments to try: the image size for models that fix it, and fewer blocks for large ones."""
    fewer: dict[str, Any] = {}
    with torch.device("meta"):
        if sum(p.numel() for p in timm.create_model(name, num_classes=CLASSES).parameters()) > LARGE:
            with contextlib.suppress(TypeError):
                timm.create_model(name, num_classes=CLASSES, depth=DEPTH)
                fewer = {"depth": DEPTH}
    yield {"img_size": size, **fewer}
    yield fewer


def _cells(model: Any, images: Tensor) -> int:
    """Cells of the last grid, from the features before the head; the smallest if there are several."""
    if not hasattr(model, "forward_features"):
        return CELLS
    shapes = [tuple(t.shape) for t in _tensors(model.forward_features(images))]
    grids = [s for s in shapes if len(s) == 4] or [s for s in shapes if len(s) == 3]
    return min(map(_positions, grids), default=CELLS)


def _positions(shape: tuple[int, ...]) -> int:
    if len(shape) == 4:
        return min(shape[1] * shape[2], shape[2] * shape[3])
    return min(shape[1:])  # tokens first or last, and fewer than channels in small images


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def _is_logits(outputs: Any) -> bool:
    try:
        return logits_of(outputs).shape == (2, CLASSES)
    except TypeError:
        return False


def _say(outputs: Any) -> str:
    shapes = [str(list(t.shape)) for t in _tensors(outputs)]
    return f"{type(outputs).__name__} {', '.join(shapes[:4])}" if shapes else type(outputs).__name__


def torchvision_families() -> list[str]:
    """Every module of torchvision.models that holds classifiers."""
    return sorted(_torchvision_models())


def _torchvision_models() -> dict[str, list[str]]:
    import torchvision

    families: dict[str, list[str]] = {}
    for name in torchvision.models.list_models(module=torchvision.models):
        module = torchvision.models.get_model_builder(name).__module__.rsplit(".", 1)[-1]
        families.setdefault(module, []).append(name)
    return families


def torchvision_subject(family: str) -> Subject:
    """The smallest classifier of a torchvision module."""
    import torchvision

    def parameters(name: str) -> int:
        return int(torchvision.models.get_model_weights(name).DEFAULT.meta["num_params"])

    name = min(_torchvision_models()[family], key=parameters)
    builder = torchvision.models.get_model_builder(name)
    size = {"vision_transformer": 96, "maxvit": 224, "alexnet": 128, "vgg": 96}.get(family, 128)
    options: dict[str, Any] = {"image_size": size} if family == "vision_transformer" else {}
    if "aux_logits" in inspect.signature(builder).parameters or family in ("googlenet", "inception"):
        options["aux_logits"] = False
    if "init_weights" in inspect.signature(builder).parameters:
        options["init_weights"] = True
    return Subject(family, name, size, lambda: builder(weights=None, num_classes=CLASSES, **options), options)
