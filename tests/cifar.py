"""CIFAR-10 and its small ResNets from the shared data: real images and really trained teachers."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

MEAN, STD = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


class Block(nn.Module):
    """Two convolutions and a parameter-free shortcut (He et al. 2016, option A)."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside)
        self.conv2, self.bn2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False), nn.BatchNorm2d(outside)
        self.stride, self.pad = stride, (outside - inside) // 2

    def forward(self, x: Tensor) -> Tensor:
        short = x[:, :, :: self.stride, :: self.stride]
        short = F.pad(short, (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + short)


class ResNet(nn.Module):
    """ResNet-(6n+2) for 32x32 images, with the parameter names of the shared checkpoints."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(*(Block(i if n == 0 else o, o, s if n == 0 else 1) for n in range(blocks)))
            for i, o, s in ((16, 16, 1), (16, 32, 2), (32, 64, 2))
        )
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        x = F.avg_pool2d(x, x.size()[3])
        return self.linear(x.view(x.size(0), -1))


def pretrained(path: Path, blocks: int) -> ResNet:
    """A network of 6*blocks+2 layers with shared weights."""
    model = ResNet(blocks)
    model.load_state_dict(load_file(path))
    return model.eval()


def images(path: Path, per_class: int) -> tuple[Tensor, Tensor]:
    """The first images of every class, normalised [N, 3, 32, 32], and their labels [N]."""
    with safe_open(path, "pt") as file:
        labels, offsets = file.get_tensor("labels"), file.get_tensor("offsets")
        jpeg = file.get_tensor("jpeg").numpy()
    chosen = [int(i) for c in range(10) for i in (labels == c).nonzero().flatten()[:per_class]]
    decoded = [Image.open(io.BytesIO(jpeg[offsets[i] : offsets[i + 1]].tobytes())) for i in chosen]
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in decoded]))
    return (pixels.permute(0, 3, 1, 2) / 255 - MEAN) / STD, labels[chosen]
