"""What the layers of a standard network become by their place: the first one, those of attentions and of the head."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from e2kd.bcos.adapted import EncodedConv2d, HeldAttention, NormaliseEncoded
from e2kd.bcos.pooled import ConvClassifier, LinearClassifier, PooledNorm
from e2kd.bcos.swaps import (
    Recipe,
    Swap,
    Unconvertible,
    bare,
    drop,
    filled,
    geometry,
    kind,
    normed,
    one_length,
    parameter,
)

Places = dict[nn.Module, Swap]
VIT = "timm.models.vision_transformer.VisionTransformer"
POOL_NORM_HEAD = "timm.layers.classifier.NormMlpClassifierHead"
ATTENTIONS = ("timm.layers.attention.Attention", "timm.models.vision_transformer.Attention")


def places(model: nn.Module, recipe: Recipe) -> tuple[Places, list[str]]:
    """The swaps for layers whose place decides, and what stands against them in words.

    Sets the flags by which timm models pool tokens and fuse attention, for no layer holds them.
    """
    found: Places = {}
    problems: list[str] = []
    for part in (_first, _attentions, _head):
        try:
            found |= part(model, recipe)
        except Unconvertible as problem:
            problems.append(str(problem))
    return found, problems


def _first(model: nn.Module, recipe: Recipe) -> Places:
    colours = len(recipe.mean)
    convs = {n: m for n, m in model.named_modules() if type(m) is nn.Conv2d and m.in_channels == colours}
    if len(convs) != 1:
        names = ", ".join(convs) or "none"
        raise Unconvertible(f"one convolution of {colours} colours must see the images, but found {names}")
    (conv,) = convs.values()
    return {conv: _encoded}


def _encoded(conv: nn.Conv2d, recipe: Recipe) -> nn.Module:
    """B-cos on both the normalised colours and their inverse, with the weights (w, -w) / 2: the same products."""
    normalise = NormaliseEncoded(recipe.mean, recipe.std, conv.weight.dtype).to(conv.weight.device)
    sizes = (2 * conv.in_channels, conv.out_channels, *geometry(conv))
    layer = bare(EncodedConv2d, normalise, *sizes, **recipe.options(conv))
    half = conv.weight / 2
    return filled(layer, parameter(torch.cat([half, -half], 1), conv.weight), conv.bias)


def _attentions(model: nn.Module, recipe: Recipe) -> Places:
    found: Places = {}
    for name, attention in model.named_modules():
        if kind(attention) not in ATTENTIONS:
            continue
        if getattr(attention, "gate", None) is not None:
            raise Unconvertible(f"{name} ({type(attention).__name__}) has a gate on its output")
        attention.fused_attn = False
        found |= {attention.qkv: _queries, attention.attn_drop: _held}
    return found


def _queries(layer: nn.Linear, recipe: Recipe) -> nn.Module:
    """Stays linear: queries and keys make the attention, values are what it weighs."""
    if not recipe.bias:
        layer.bias = None  # type: ignore[assignment]
    return layer


def _held(layer: nn.Dropout, recipe: Recipe) -> nn.Module:
    return HeldAttention(layer.p)


def _head(model: Any, recipe: Recipe) -> Places:
    classifier = model.get_classifier() if hasattr(model, "get_classifier") else None
    if not isinstance(classifier, nn.Linear):
        got = "nothing" if classifier is None else type(classifier).__name__
        raise Unconvertible(f"`get_classifier()` must give the linear layer that makes the logits, but gave {got}")
    if kind(model) == VIT:
        return _token_head(model, classifier)
    found: Places = {classifier: _conv_classifier}
    for head in model.modules():
        if kind(head) == POOL_NORM_HEAD:
            if head.hidden_size:
                raise Unconvertible("a hidden layer lies between the pooling and the classifier")
            if not isinstance(head.norm, (nn.LayerNorm, nn.Identity)):
                raise Unconvertible(f"{type(head.norm).__name__} lies between the pooling and the classifier")
            found |= {head.norm: partial(_pooled_norm, first=0), head.flatten: drop}
    return found


def _token_head(model: Any, classifier: nn.Linear) -> Places:
    if model.global_pool == "token":
        return {classifier: partial(_linear_classifier, first=0)}
    if model.global_pool != "avg":
        raise Unconvertible(f"tokens are pooled by {model.global_pool!r}, neither 'token' nor 'avg'")
    model.global_pool = ""
    first = 0 if getattr(model, "pool_include_prefix", False) else model.num_prefix_tokens
    found: Places = {classifier: partial(_linear_classifier, first=first)}
    if isinstance(model.fc_norm, nn.LayerNorm):
        found[model.fc_norm] = partial(_pooled_norm, first=first)
    return found


def _conv_classifier(layer: nn.Linear, recipe: Recipe) -> nn.Module:
    made = bare(ConvClassifier, layer.in_features, layer.out_features, recipe.logit_bias, **recipe.options(layer))
    return filled(made, parameter(layer.weight[:, :, None, None], layer.weight), layer.bias)


def _linear_classifier(layer: nn.Linear, recipe: Recipe, *, first: int) -> nn.Module:
    sizes = (layer.in_features, layer.out_features, recipe.logit_bias)
    made = bare(LinearClassifier, *sizes, first=first, **recipe.options(layer))
    return filled(made, layer.weight, layer.bias)


def _pooled_norm(norm: nn.LayerNorm, recipe: Recipe, *, first: int) -> nn.Module:
    return normed(PooledNorm, norm, recipe, one_length(norm), first=first)
