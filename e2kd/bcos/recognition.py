"""Which B-cos network a state_dict belongs to, read from its keys and shapes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn

from e2kd.bcos.blocks import BasicBlock, Bottleneck, Layer
from e2kd.bcos.convnext import BcosConvNeXt
from e2kd.bcos.densenet import BcosDenseNet
from e2kd.bcos.norms import BatchNormUncentered2d
from e2kd.bcos.resnet import BcosResNet
from e2kd.bcos.vgg import BcosVGG
from e2kd.bcos.vit import bcos_vit

State = dict[str, Tensor]
HEAD = 64  # channels of each attention head, in all released ViTs


def recognised(state: State) -> Callable[..., nn.Module]:
    """What builds the network: called with `b`, `logit_bias` and, for CNNs, perhaps `norm`.

    Raises:
        ValueError: for keys of no B-cos network.

    >>> from e2kd.bcos import BcosResNet, BasicBlock
    >>> state = BcosResNet(BasicBlock, (1, 2), num_classes=5, width=4).state_dict()
    >>> recognised(state).keywords["depths"], recognised(state).keywords["num_classes"]
    ([1, 2], 5)
    """
    key = next((key for key in READERS if key in state), None)
    if key is not None:
        try:
            return READERS[key](state)
        except KeyError as missing:
            raise ValueError(f"The file has {key!r} of a B-cos network but lacks {missing}; is it whole?") from missing
    looks = " Its biases are those of a standard network." if any(key.endswith(".bias") for key in state) else ""
    raise ValueError(
        f"Expected the keys of an official B-cos network, one of {', '.join(READERS)}; the file's first keys are "
        f"{', '.join(list(state)[:3])}.{looks}"
    )


def _resnet(state: State) -> Callable[..., nn.Module]:
    bottleneck = "layer1.0.conv3.linear.weight" in state
    width, stem = len(state["bn1.weight"]), state["conv1.linear.weight"]
    options: dict[str, Any] = _cnn(state, "bn1", stem, state["fc.linear.weight"])
    if bottleneck:
        inner = len(state["layer1.0.bn1.weight"])
        groups = inner // state["layer1.0.conv2.linear.weight"].shape[1]
        options |= {"groups": groups, "group_width": inner * 64 // (width * groups)}
    depths = [_count(state, rf"layer{i + 1}\.(\d+)\.") for i in range(_count(state, r"layer(\d+)\.") - 1)]
    return partial(
        BcosResNet,
        block=Bottleneck if bottleneck else BasicBlock,
        depths=depths,
        width=width,
        small_images=stem.shape[-1] == 3,
        **options,
    )


def _densenet(state: State) -> Callable[..., nn.Module]:
    layer = "features.denseblock1.denselayer1."
    inner = len(state[f"{layer}norm2.weight"])
    options = _cnn(state, f"{layer}norm2", state[f"{layer}conv1.linear.weight"], state["classifier.linear.weight"])
    growth = len(state[f"{layer}conv2.linear.weight"]) // options["max_out"]
    blocks = _count(state, r"features\.denseblock(\d+)\.") - 1
    return partial(
        BcosDenseNet,
        depths=[_count(state, rf"features\.denseblock{i + 1}\.denselayer(\d+)\.") - 1 for i in range(blocks)],
        growth=growth,
        width=len(state["features.conv0.linear.weight"]) // options["max_out"],
        bottleneck=inner // growth,
        small_images="features.norm0.weight" not in state,
        **options | {"in_channels": state["features.conv0.linear.weight"].shape[1]},
    )


def _vgg(state: State) -> Callable[..., nn.Module]:
    places = _numbers(state, r"features\.(\d+)\.linear\.weight")
    convs = [state[f"features.{place}.linear.weight"] for place in places]
    max_out = len(convs[0]) // [*convs, state["classifier.0.linear.weight"]][1].shape[1]
    depths, widths = [0], [len(convs[0]) // max_out]
    for before, place, conv in zip([places[0], *places], places, convs, strict=False):
        if place - before > 2:  # a pooling layer lies between
            depths.append(0)
            widths.append(len(conv) // max_out)
        depths[-1] += 1
    options = _cnn(state, "features.1", convs[0], state["classifier.2.linear.weight"], max_out)
    if "features.1.weight" not in state:
        options["norm"] = None
    hidden = len(state["classifier.0.linear.weight"]) // max_out
    return partial(BcosVGG, depths=depths, widths=widths, hidden=hidden, **options)


def _convnext(state: State) -> Callable[..., nn.Module]:
    stages = _numbers(state, r"features\.(\d+)\.0\.layer_scale")
    options = _cnn(state, "features.1", state["features.0.linear.weight"], state["classifier.1.linear.weight"])
    if "features.1.running_var" not in state:
        options["norm"] = None
    return partial(
        BcosConvNeXt,
        depths=[_count(state, rf"features\.{stage}\.(\d+)\.layer_scale") for stage in stages],
        widths=[len(state[f"features.{stage}.0.layer_scale"]) for stage in stages],
        **options,
    )


def _vit(state: State) -> Callable[..., nn.Module]:
    dim, embedding = len(state["0.linear_head.norm.weight"]), state["0.to_patch_embedding.linear.linear.weight"]
    if dim % HEAD:
        raise ValueError(f"Expected tokens of a length divisible by {HEAD}, as in all released ViTs, but got {dim}.")
    max_out = len(embedding) // dim
    places = _numbers(state, r"0\.to_patch_embedding\.conv_stem\.(\d+)\.linear\.weight")
    stem = [len(state[f"0.to_patch_embedding.conv_stem.{place + 1}.weight"]) for place in places]
    channels = state["0.to_patch_embedding.conv_stem.0.linear.weight"].shape[1] if stem else 6
    return partial(
        bcos_vit,
        dim=dim,
        depth=_count(state, r"0\.transformer\.encoder_(\d+)\."),
        heads=dim // HEAD,
        hidden=len(state["0.transformer.encoder_0.ff.net.linear1.linear.weight"]) // max_out,
        num_classes=len(state["0.linear_head.linear.linear.weight"]) // max_out,
        patch_size=math.isqrt(embedding.shape[1] // (stem[-1] if stem else channels)),
        stem=stem,
        in_channels=channels,
        max_out=max_out,
    )


READERS: dict[str, Callable[[State], Callable[..., nn.Module]]] = {
    "conv1.linear.weight": _resnet,
    "features.conv0.linear.weight": _densenet,
    "0.to_patch_embedding.linear.linear.weight": _vit,
    "features.2.0.layer_scale": _convnext,
    "features.0.linear.weight": _vgg,
}


def _cnn(state: State, norm: str, conv: Tensor, classifier: Tensor, max_out: int | None = None) -> dict[str, Any]:
    """What all CNNs have; `norm` follows `conv`, so that both lengths tell the max-out."""
    max_out = len(conv) // len(state[f"{norm}.weight"]) if max_out is None else max_out
    found: dict[str, Any] = {
        "num_classes": len(classifier) // max_out,
        "in_channels": conv.shape[1],
        "max_out": max_out,
    }
    if f"{norm}.running_var" in state:
        found["norm"] = _batch_norm(state, norm)
    return found


def _batch_norm(state: State, norm: str) -> Layer:
    return partial(BatchNormUncentered2d, bias=True) if f"{norm}.bias" in state else BatchNormUncentered2d


def _numbers(keys: Iterable[str], pattern: str) -> list[int]:
    """The different numbers that a pattern's group has in the keys, in order."""
    return sorted({int(match[1]) for key in keys if (match := re.match(pattern, key))})


def _count(keys: Iterable[str], pattern: str) -> int:
    """One more than the largest number that a pattern's group has in the keys, so that gaps are seen later."""
    return max(_numbers(keys, pattern), default=-1) + 1
