"""What the layers of a standard network become in a B-cos network, by their type."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from e2kd.bcos.adapted import BatchNormActUncentered2d
from e2kd.bcos.convolution import BcosConv2d
from e2kd.bcos.encoding import GELU
from e2kd.bcos.linear import BcosLinear
from e2kd.bcos.norms import BatchNormUncentered2d, GroupNorm2d, LayerNorm, PositionNorm2d


@dataclass(frozen=True)
class Recipe:
    """The settings of a conversion: those of `bcosify`."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    b: float
    bias: bool
    max_pool: bool
    logit_bias: float | None

    def options(self, layer: nn.Module) -> dict[str, Any]:
        """The options of the B-cos layer in the place of a standard one."""
        return {"b": self.b, "unit_weights": False, "bias": self.bias and layer.bias is not None}


class Unconvertible(ValueError):
    """Why a layer can't be converted, in words that follow the name of its class."""


Swap = Callable[[Any, Recipe], nn.Module]  # a layer -> what takes its place, which may be the layer itself


def bare(make: Callable[..., nn.Module], *args: Any, **options: Any) -> Any:
    """A layer without memory, to be given the parameters of another."""
    with torch.device("meta"):
        return make(*args, **options)


def parameter(values: Tensor, like: Tensor) -> nn.Parameter:
    """A parameter that is trained where another one is."""
    return nn.Parameter(values.detach(), like.requires_grad)


def geometry(conv: nn.Conv2d) -> tuple[Any, ...]:
    """The arguments of a convolution after its channels."""
    return conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode


def filled(layer: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A bare B-cos layer with a weight, and with a bias if it has a place for one."""
    layer.linear.weight = weight
    if layer.linear.bias is not None:
        layer.linear.bias = bias
    return layer  # type: ignore[no-any-return]


def keep(layer: nn.Module, recipe: Recipe) -> nn.Module:
    """Linear, or piecewise linear without an offset: an explanation passes it as it is."""
    return layer


def activation(layer: nn.ReLU | nn.LeakyReLU, recipe: Recipe) -> nn.Module:
    """Piecewise linear; not in place, since explanations need what the layer before returned."""
    layer.inplace = False
    return layer


def drop(layer: nn.Module, recipe: Recipe) -> nn.Module:
    """Nothing in its place."""
    return nn.Identity()


def convolution(conv: nn.Conv2d, recipe: Recipe) -> nn.Module:
    """B-cos, with the weights as they are."""
    layer = bare(BcosConv2d, conv.in_channels, conv.out_channels, *geometry(conv), **recipe.options(conv))
    return filled(layer, conv.weight, conv.bias)


def linear(layer: nn.Linear, recipe: Recipe) -> nn.Module:
    """B-cos, with the weights as they are."""
    made = bare(BcosLinear, layer.in_features, layer.out_features, **recipe.options(layer))
    return filled(made, layer.weight, layer.bias)


def batch_norm(norm: nn.BatchNorm2d, recipe: Recipe) -> nn.Module:
    """Uncentred; what the mean took away goes to the bias, so that a norm with bias is the same in eval mode."""
    return _uncentred(bare(BatchNormUncentered2d, *_batch_settings(norm), bias=recipe.bias), norm)


def batch_norm_act(norm: Any, recipe: Recipe) -> nn.Module:
    """The same, and what timm puts into the same module: dropout and activation."""
    try:
        after = [swapped(part, recipe) for part in (norm.drop, norm.act)]
    except Unconvertible as problem:
        raise Unconvertible(
            f"with {type(norm.drop).__name__} and {type(norm.act).__name__}, one {problem}"
        ) from problem
    return _uncentred(bare(BatchNormActUncentered2d, after, *_batch_settings(norm), bias=recipe.bias), norm)


def _batch_settings(norm: nn.BatchNorm2d) -> tuple[Any, ...]:
    if not norm.affine or norm.running_mean is None:
        raise Unconvertible("without weights or running statistics")
    return norm.num_features, norm.eps, norm.momentum


def _uncentred(made: Any, norm: nn.BatchNorm2d) -> nn.Module:
    made.weight = norm.weight
    for name, statistics in norm.named_buffers(recurse=False):
        setattr(made, name, statistics)
    if made.bias is not None:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        shift = norm.running_mean * (norm.running_var + norm.eps).rsqrt()
        made.bias = parameter(norm.bias - shift * norm.weight, norm.bias)
        made.running_mean = torch.zeros_like(norm.running_mean)  # now in the bias, should anybody else subtract it
    return made  # type: ignore[no-any-return]


def layer_norm(norm: nn.LayerNorm, recipe: Recipe) -> nn.Module:
    """Centred, with 1/std as a dynamic weight."""
    return normed(LayerNorm, norm, recipe, one_length(norm))


def position_norm(norm: nn.LayerNorm, recipe: Recipe) -> nn.Module:
    """The same over the channels of maps."""
    return normed(PositionNorm2d, norm, recipe, one_length(norm))


def group_norm(norm: nn.GroupNorm, recipe: Recipe) -> nn.Module:
    """The same in groups of channels."""
    return normed(GroupNorm2d, norm, recipe, norm.num_groups, norm.num_channels)


def one_length(norm: nn.LayerNorm) -> int:
    """The only length that a layer norm goes over."""
    if len(norm.normalized_shape) != 1:
        raise Unconvertible(f"over {len(norm.normalized_shape)} dimensions")
    return norm.normalized_shape[0]


def normed(make: Callable[..., nn.Module], norm: Any, recipe: Recipe, *sizes: int, **options: int) -> nn.Module:
    """A norm of another class with the weights of a standard one."""
    affine = norm.weight is not None
    made = bare(make, *sizes, norm.eps, affine, bias=recipe.bias and norm.bias is not None, **options)
    made.weight = norm.weight
    if made.bias is not None:
        made.bias = norm.bias
    return made  # type: ignore[no-any-return]


def gelu(layer: nn.Module, recipe: Recipe) -> nn.Module:
    """Its gate becomes a dynamic weight."""
    if getattr(layer, "approximate", "none") != "none":
        raise Unconvertible("that is approximate")
    return GELU()


def max_pool(layer: nn.MaxPool2d, recipe: Recipe) -> nn.Module:
    """Averages in the same windows, as B-cos networks do."""
    if recipe.max_pool:
        return layer
    if layer.dilation not in (1, (1, 1)) or layer.return_indices:
        raise Unconvertible("that is dilated or returns indices")
    return nn.AvgPool2d(layer.kernel_size, layer.stride, layer.padding, layer.ceil_mode)


def global_pool(pool: Any, recipe: Recipe) -> nn.Module:
    """Nothing: pooling comes after the classifier."""
    if pool.pool_type not in ("avg", "fast", "fastavg"):
        raise Unconvertible(f"by {pool.pool_type!r} in place of 'avg'")
    return nn.Identity()


def kind(module: nn.Module) -> str:
    """The full name of a module's class; a subclass is another kind, for it may compute something else.

    >>> kind(nn.ReLU())
    'torch.nn.modules.activation.ReLU'
    """
    return f"{type(module).__module__}.{type(module).__qualname__}"


TORCH: dict[type[nn.Module], Swap] = {
    nn.Conv2d: convolution,
    nn.Linear: linear,
    nn.BatchNorm2d: batch_norm,
    nn.LayerNorm: layer_norm,
    nn.GroupNorm: group_norm,
    nn.GELU: gelu,
    nn.MaxPool2d: max_pool,
    **dict.fromkeys((nn.ReLU, nn.LeakyReLU), activation),
    **dict.fromkeys((nn.Identity, nn.Dropout, nn.Dropout2d, nn.AvgPool2d), keep),
}
SWAPS: dict[str, Swap] = {f"{cls.__module__}.{cls.__qualname__}": swap for cls, swap in TORCH.items()} | {
    "timm.layers.activations.GELU": gelu,
    "timm.layers.adaptive_avgmax_pool.SelectAdaptivePool2d": global_pool,
    "timm.layers.drop.DropPath": keep,
    "timm.layers.layer_scale.LayerScale": keep,
    "timm.layers.norm.GroupNorm": group_norm,
    "timm.layers.norm.GroupNorm1": group_norm,
    "timm.layers.norm.LayerNorm": layer_norm,
    "timm.layers.norm.LayerNorm2d": position_norm,
    "timm.layers.norm_act.BatchNormAct2d": batch_norm_act,
    "timm.models.vision_transformer.LayerScale": keep,  # older timm
}


def swapped(layer: nn.Module, recipe: Recipe, swap: Swap | None = None) -> nn.Module:
    """What takes a layer's place: by the swap for its place, else by the one for its type.

    Raises:
        Unconvertible: for types without a swap, and for layers whose swap can't take their settings.
    """
    swap = SWAPS.get(kind(layer)) if swap is None else swap
    if swap is None:
        raise Unconvertible("without a B-cos form")
    made = swap(layer, recipe)
    return made if made is layer else made.train(layer.training)
