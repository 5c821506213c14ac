"""A teacher and small students of many families for images of 64 pixels, whose maps have 4x4 or 8x8 cells."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.cifar import NORMALIZATION, ResNet, pretrained
from benchmarks.cifar_data import SHARED

WEIGHTS = {5: "cifar_resnet32-d509ac18", 3: "cifar_resnet20-12fca82f"}  # by blocks in each stage
SIDE = 64


class Student(NamedTuple):
    """How a student is made, for so many classes; the peak of AdamW's one-cycle schedule; its name in tables."""

    make: Callable[[int], nn.Module]
    learning_rate: float
    title: str


def normalised(network: nn.Module) -> nn.Module:
    """A network that takes images in [0, 1]."""
    from torchvision.transforms import Normalize

    return nn.Sequential(OrderedDict(normalize=Normalize(*NORMALIZATION), network=network))


def resnet(network: ResNet, classes: int) -> nn.Module:
    """A CIFAR ResNet for images of twice the side: its stem takes every second pixel, its maps stay 8x8."""
    network.conv1.stride = (2, 2)
    network.linear = nn.Linear(network.linear.in_features, classes)
    return normalised(network)


def from_cifar(blocks: int, classes: int) -> nn.Module:
    """The shared CIFAR ResNet of so many blocks in each stage, with its weights but those of the classifier."""
    path = SHARED / "data" / "pretrained" / f"{WEIGHTS[blocks]}.safetensors"
    return resnet(pretrained(path, blocks), classes)


def convnext(classes: int) -> nn.Module:
    """4x4 patches; the later stages are dilated."""
    from timm.models.convnext import ConvNeXt

    return normalised(ConvNeXt(num_classes=classes, depths=(1, 1, 2, 1), dims=(24, 48, 64, 96), output_stride=8))


def shufflenet(classes: int) -> nn.Module:
    """The stem keeps the image's side until its pooling."""
    from torchvision.models import shufflenet_v2_x0_5

    model = shufflenet_v2_x0_5(num_classes=classes)
    model.conv1[0].stride = (1, 1)
    return normalised(model)


def vit(classes: int) -> nn.Module:
    """8x8 patches, tokens pooled."""
    from timm.models.vision_transformer import VisionTransformer

    size: dict[str, Any] = {"embed_dim": 96, "depth": 4, "num_heads": 3}
    return normalised(VisionTransformer(SIDE, 8, num_classes=classes, global_pool="avg", class_token=False, **size))


def dilated(name: str) -> Callable[[int], nn.Module]:
    """A network of timm whose maps stay 8x8."""

    def make(classes: int) -> nn.Module:
        import timm

        return normalised(timm.create_model(name, num_classes=classes, output_stride=8))

    return make


STUDENTS = {
    "resnet": Student(lambda classes: resnet(ResNet(2), classes), 3e-3, "ResNet-14"),
    "convnext": Student(convnext, 1e-3, "ConvNeXt, 0.2 M"),
    "efficientnet": Student(dilated("test_efficientnet"), 3e-3, "EfficientNet, 0.1 M"),
    "mobilenet": Student(dilated("mobilenetv2_035"), 3e-3, "MobileNetV2 x0.35"),
    "shufflenet": Student(shufflenet, 3e-3, "ShuffleNetV2 x0.5"),
    "vit": Student(vit, 1e-3, "ViT, 0.5 M"),
}


def trained_once(path: Path, network: nn.Module, train: Callable[[nn.Module], object]) -> nn.Module:
    """The network in eval mode with the weights in a file, which are trained if there is none."""
    if not path.exists():
        train(network)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(network.state_dict(), path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
    network.load_state_dict(load_file(path))
    return network.eval()
