"""Pretrained standard networks become B-cos networks (B-cosification)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import nn

from e2kd.bcos.linear import check_transform
from e2kd.bcos.loading import listed
from e2kd.bcos.places import ATTENTIONS, POOL_NORM_HEAD, VIT, Places, places
from e2kd.bcos.swaps import Recipe, Unconvertible, kind, swapped
from e2kd.errors import UnsupportedModel
from e2kd.modes import timm_configuration

Model = TypeVar("Model", bound=nn.Module)
# Modules that pass tensors through their children and add, join, reshape or scale them: what a swap of layers can't
# see is linear in them.
WALKED = frozenset(
    {
        *("torch.nn.modules.container.Sequential", "torch.nn.modules.container.ModuleList"),
        *(f"timm.models.resnet.{name}" for name in ("ResNet", "BasicBlock", "Bottleneck")),
        *(f"timm.models.densenet.{name}" for name in ("DenseNet", "DenseBlock", "DenseLayer", "DenseTransition")),
        *(f"timm.models.convnext.{name}" for name in ("ConvNeXt", "ConvNeXtStage", "ConvNeXtBlock", "Downsample")),
        *("timm.models.vgg.VGG", "timm.models.vgg.ConvMlp", "timm.layers.classifier.ClassifierHead", POOL_NORM_HEAD),
        *(VIT, "timm.models.vision_transformer.Block", "timm.layers.patch_embed.PatchEmbed", "timm.layers.mlp.Mlp"),
        *ATTENTIONS,
    }
)
ADDED = ("bias", "pos_embed", "cls_token", "reg_token")  # names of parameters that are added to something
ATTENTION = {"q_norm", "k_norm"}  # what these add to is the attention, which explanations hold fixed


@dataclass(frozen=True)
class Change:
    """One layer that took another's place: the name of the place, and both classes."""

    name: str
    before: str
    after: str


@dataclass(frozen=True)
class Conversion:
    """What `bcosify` did to a network; print it.

    Args:
        network: its class.
        b: of its B-cos layers.
        changes: the layers that were replaced.
        removed: names of the biases that were left out.
        added: names of the parameters whose values the network adds to something, which explain what the
            contributions of the pixels leave of a logit.
    """

    network: str
    b: float
    changes: tuple[Change, ...]
    removed: tuple[str, ...]
    added: tuple[str, ...]

    def __str__(self) -> str:
        groups: dict[tuple[str, str], list[str]] = {}
        for change in self.changes:
            groups.setdefault((change.before, change.after), []).append(change.name)
        width = max((len(before) + len(after) for before, after in groups), default=0) + 4
        lines = [f"{self.network} as a B-cos network, b = {self.b:g}"]
        lines += [
            f"{len(names):5} {f'{before} -> {after}':{width}}  {_span(names)}"
            for (before, after), names in groups.items()
        ]
        lines += [f"{len(self.removed):5} biases left out"] if self.removed else []
        lines += [f"{len(self.added):5} parameters add to the logits: {_span(self.added)}"] if self.added else []
        return "\n".join(lines)


def _class(layer: nn.Module) -> str:
    """The class of a layer; e2kd's have names that torch's have as well."""
    name = type(layer).__name__
    return f"bcos.{name}" if type(layer).__module__.startswith("e2kd.") else name


def _span(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) < 3 else f"{names[0]} ... {names[-1]}"


def bcosify(
    model: Model,
    *,
    b: float = 2,
    bias: bool = False,
    max_pool: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    logit_bias: float | None = None,
) -> Model:
    """A B-cos network made from a pretrained one, to be trained further (B-cosification, Arya et al. 2024).

    Takes timm's ResNets, DenseNets, ConvNeXts, VGGs and ViTs. Convolutions and linear layers become B-cos with their
    weights as they are, queries, keys and values stay linear; batch norms become uncentred; GELUs, norms and
    attention become dynamic weights, ReLUs stay; max pooling becomes average pooling; the classifier comes before
    the global pooling; images are encoded by `AddInverse` and not normalised. What changes the function is b and the
    three options: with `b=1, bias=True, max_pool=True, logit_bias=0` the network gives, in eval mode, the logits of
    the one it was made from. Train it with binary cross-entropy, as its logits are meant.

    Contributions `W(x) * x` of the pixels sum to the logit minus `logit_bias` if the network adds nothing inside. The
    rest comes from `conversion.added` (biases that were kept, a ViT's position embedding and class token): each of
    these parameters contributes `mode.weights(score, parameter) * parameter`.

    Args:
        model: stays as it is.
        b: of all B-cos layers, >= 1.
        bias: keep the biases. The recipe leaves all of them out.
        max_pool: keep max pooling.
        mean, std: of the colours of the images that the model was trained on; a timm model knows them.
        logit_bias: -log(classes - 1) if None.

    Returns:
        A network of the same class. Its `conversion` says what was changed.

    Raises:
        UnsupportedModel: names everything that can't be converted.

    >>> import timm, torch
    >>> from e2kd.bcos import AddInverse
    >>> model = bcosify(timm.create_model("resnet18", num_classes=10))
    >>> model(AddInverse()(torch.rand(1, 3, 64, 64))).shape
    torch.Size([1, 10])
    >>> print(model.conversion)
    ResNet as a B-cos network, b = 2
        1 Conv2d -> bcos.EncodedConv2d               conv1
       20 BatchNorm2d -> bcos.BatchNormUncentered2d  bn1 ... layer4.1.bn2
        1 MaxPool2d -> AvgPool2d                     maxpool
       19 Conv2d -> bcos.BcosConv2d                  layer1.0.conv1 ... layer4.1.conv2
        1 SelectAdaptivePool2d -> Identity           global_pool
        1 Linear -> bcos.ConvClassifier              fc
       21 biases left out
    """
    check_transform(b, 1)
    recipe = Recipe(*_normalisation(model, mean, std), b, bias, max_pool, logit_bias)
    if kind(model) not in WALKED:
        raise _refusal(model, [f"the forward of {kind(model)} is not known"])
    made: Any = copy.deepcopy(model)
    by_place, problems = places(made, recipe)
    walk = _Walk(recipe, by_place)
    walk.through(made, "")
    problems += [listed(what, names) for what, names in walk.refused.items()]
    if problems:
        raise _refusal(model, problems)
    removed = () if bias else tuple(name for name in _added(model) if name.endswith("bias"))
    added = tuple(name for name in _added(made) if ATTENTION.isdisjoint(name.split(".")))
    made.conversion = Conversion(type(model).__name__, b, tuple(walk.changes), removed, added)
    _expect_plain_colours(made)
    return made  # type: ignore[no-any-return]


@dataclass
class _Walk:
    """Replaces the layers of a network from the outside to the inside, and collects what it did and what it can't."""

    recipe: Recipe
    by_place: Places
    changes: list[Change] = field(default_factory=list)
    refused: dict[str, list[str]] = field(default_factory=dict)
    done: dict[nn.Module, nn.Module] = field(default_factory=dict)

    def through(self, parent: nn.Module, prefix: str) -> None:
        """All children of a module, whose names begin with the prefix."""
        for name, child in parent._modules.items():
            if child is None:
                continue
            if kind(child) in WALKED:
                self.through(child, f"{prefix}{name}.")
            else:
                setattr(parent, name, self.in_place_of(child, prefix + name))

    def in_place_of(self, layer: nn.Module, name: str) -> nn.Module:
        """The layer's other form; the same one again where a layer is used twice."""
        if layer not in self.done:
            try:
                self.done[layer] = swapped(layer, self.recipe, self.by_place.get(layer))
            except Unconvertible as problem:
                self.refused.setdefault(f"{type(layer).__name__} {problem}", []).append(name)
                self.done[layer] = layer
            if self.done[layer] is not layer:
                self.changes.append(Change(name, _class(layer), _class(self.done[layer])))
        return self.done[layer]


def _refusal(model: nn.Module, problems: Sequence[str]) -> UnsupportedModel:
    return UnsupportedModel(
        f"{type(model).__name__} can't become a B-cos network: {'; '.join(problems)}. bcosify takes timm's ResNets, "
        "DenseNets, ConvNeXts, VGGs and ViTs made of convolutions, linear layers, batch, layer and group norms, ReLU, "
        "GELU, average and max pooling."
    )


def _normalisation(
    model: nn.Module, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """What was said, else what a timm model knows of itself."""
    known = timm_configuration(model)
    mean, std = (known.get(name) if given is None else given for name, given in (("mean", mean), ("std", std)))
    if mean is None or std is None or len(mean) != len(std) or not all(s > 0 for s in std):
        raise ValueError(
            f"Expected the mean and std > 0 of the colours that {type(model).__name__} was trained on, but got {mean} "
            f"and {std}. Pass them, for instance mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)."
        )
    return tuple(mean), tuple(std)


def _added(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters() if name.split(".")[-1] in ADDED]


def _expect_plain_colours(model: Any) -> None:
    """What timm tells data loaders of the model: images in [0, 1], not normalised."""
    if known := timm_configuration(model):
        colours = len(known["mean"]) if "mean" in known else 3
        model.pretrained_cfg = known | {"mean": (0.0,) * colours, "std": (1.0,) * colours}
        model.default_cfg = model.pretrained_cfg
