"""Three ways of distilling, by answers, attention maps and features, from a teacher whose outputs are kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import e2kd
from benchmarks.cifar import ResNet

STAGES = ("layer1", "layer2", "layer3")
TEMPERATURE, ATTENTION, FEATURES = 4.0, 1000.0, 1e-3  # the papers' temperature and weights


class Outputs(NamedTuple):
    """Logits [B, K], and the features [B, C, h, w] at the end of every stage before their ReLU."""

    logits: Tensor
    stages: list[Tensor]


Way = Callable[[Outputs, Outputs], Tensor]  # of the student's and the teacher's outputs, the loss []


def outputs_of(model: ResNet, images: Tensor) -> Outputs:
    """What a network says of images and what its stages hold."""
    x, found = F.relu(model.bn1(model.conv1(images))), []
    for layer in (model.layer1, model.layer2, model.layer3):
        for block in layer[:-1]:
            x = block(x)
        last = layer[-1]
        short = F.pad(x[:, :, :: last.stride, :: last.stride], (0, 0, 0, 0, last.pad, last.pad))
        found.append(last.bn2(last.conv2(F.relu(last.bn1(last.conv1(x))))) + short)
        x = F.relu(found[-1])
    return Outputs(model.linear(x.mean((2, 3))), found)


class Teaching:
    """A teacher's outputs for images [N, 3, H, W] as they are and mirrored, so that it is asked once."""

    def __init__(self, teacher: ResNet, images: Tensor) -> None:
        with torch.no_grad():
            found = [outputs_of(teacher, part) for part in torch.cat([images, images.flip(3)]).split(100)]
        self.count = len(images)
        self.logits = torch.cat([part.logits for part in found])
        self.stages = [torch.cat(maps) for maps in zip(*(part.stages for part in found), strict=True)]

    def of(self, rows: Tensor, mirrored: Tensor) -> Outputs:
        """For images [B], each mirrored or not, bool [B]."""
        places = rows + self.count * mirrored
        return Outputs(self.logits[places], [maps[places] for maps in self.stages])


def by_answers(student: Outputs, teacher: Outputs) -> Tensor:
    """KL divergence of softened answers (Hinton et al. 2015)."""
    return e2kd.kd_loss(student.logits, teacher.logits, temperature=TEMPERATURE)


def by_attention(student: Outputs, teacher: Outputs) -> Tensor:
    """Squared distance of the energies over space, each of unit length (Zagoruyko and Komodakis 2017)."""

    def energy(features: Tensor) -> Tensor:
        return F.normalize(features.relu().square().mean(1).flatten(1))

    pairs = zip(student.stages, teacher.stages, strict=True)
    return ATTENTION / 2 * torch.stack([(energy(a) - energy(b)).square().mean() for a, b in pairs]).sum()


class ByFeatures(nn.Module):
    """Partial squared distance of features (Heo et al. 2019, "overhaul").

    The student's are mapped by a 1x1 convolution, the teacher's are cut at a margin: the mean of a channel's negative
    values. Where the teacher's are negative and the student's lower still, nothing is asked of the student.
    """

    def __init__(self, student: ResNet, teaching: Teaching) -> None:
        super().__init__()
        self.margins = [-(-x).relu().sum((0, 2, 3)) / (x < 0).sum((0, 2, 3)).clamp_min(1) for x in teaching.stages]
        widths = [student.bn1.num_features * 2**k for k in range(len(STAGES))]
        self.maps = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, x.shape[1], 1, bias=False), nn.BatchNorm2d(x.shape[1]))
            for width, x in zip(widths, teaching.stages, strict=True)
        )

    def forward(self, student: Outputs, teacher: Outputs) -> Tensor:
        total, count = torch.zeros(()), len(student.logits)
        for k, (given, goal) in enumerate(zip(student.stages, teacher.stages, strict=True)):
            wanted, mapped = torch.maximum(goal, self.margins[k][:, None, None]), self.maps[k](given)
            counts = (mapped > wanted) | (wanted > 0)
            total = total + ((mapped - wanted).square() * counts).sum() / count / 2 ** (len(STAGES) - 1 - k)
        return FEATURES * total
