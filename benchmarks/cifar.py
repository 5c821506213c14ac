"""CIFAR-10 and its small ResNets from the shared data: real images and really trained teachers."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

CLASSES = 10
NORMALIZATION = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and std that the shared networks expect
MEAN, STD = (torch.tensor(v)[:, None, None] for v in NORMALIZATION)


class Block(nn.Module):
    """Two convolutions and a parameter-free shortcut (He et al. 2016, option A).

    ReLUs are modules, so that methods can compare what enters them.
    """

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside)
        self.conv2, self.bn2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False), nn.BatchNorm2d(outside)
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()
        self.stride, self.pad = stride, (outside - inside) // 2

    def forward(self, x: Tensor) -> Tensor:
        short = x[:, :, :: self.stride, :: self.stride]
        short = F.pad(short, (0, 0, 0, 0, self.pad, self.pad))
        return self.relu2(self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x))))) + short)


class ResNet(nn.Module):
    """ResNet-(6n+2) for 32x32 images, with the parameter names of the shared checkpoints, which are 16 wide."""

    def __init__(self, blocks: int, width: int = 16, classes: int = CLASSES) -> None:
        super().__init__()
        w = width
        self.conv1, self.bn1 = nn.Conv2d(3, w, 3, 1, 1, bias=False), nn.BatchNorm2d(w)
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(*(Block(i if n == 0 else o, o, s if n == 0 else 1) for n in range(blocks)))
            for i, o, s in ((w, w, 1), (w, 2 * w, 2), (2 * w, 4 * w, 2))
        )
        self.relu, self.linear = nn.ReLU(), nn.Linear(4 * w, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.relu(self.bn1(self.conv1(x))))))
        x = F.avg_pool2d(x, x.size()[3])
        return self.linear(x.view(x.size(0), -1))


def pretrained(path: Path, blocks: int) -> ResNet:
    """A network of 6*blocks+2 layers with shared weights."""
    model = ResNet(blocks)
    model.load_state_dict(load_file(path))
    return model.eval()


def labels_of(path: Path) -> Tensor:
    """The labels [N] of a file."""
    with safe_open(path, "pt") as file:
        return file.get_tensor("labels")


def pixels(path: Path, chosen: Iterable[int]) -> Tensor:
    """Images at these places of a file, decoded: [B, 3, 32, 32] uint8."""
    with safe_open(path, "pt") as file:
        offsets, jpeg = file.get_tensor("offsets"), file.get_tensor("jpeg").numpy()
    decoded = [Image.open(io.BytesIO(jpeg[offsets[i] : offsets[i + 1]].tobytes())) for i in chosen]
    stacked = torch.from_numpy(np.stack([np.asarray(image) for image in decoded]))
    return stacked.permute(0, 3, 1, 2).contiguous()


def normalized(images: Tensor) -> Tensor:
    """Images as the networks expect them, from pixels [B, 3, h, w] uint8 or from [0, 1]."""
    return ((images if images.is_floating_point() else images / 255) - MEAN) / STD


def images(path: Path, per_class: int) -> tuple[Tensor, Tensor]:
    """The first images of every class, normalised [N, 3, 32, 32], and their labels [N]."""
    labels = labels_of(path)
    chosen = torch.cat([(labels == c).nonzero().flatten()[:per_class] for c in range(CLASSES)])
    return normalized(pixels(path, chosen.tolist())), labels[chosen]
