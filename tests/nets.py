"""Small smooth networks for exact tests: Softplus has no kinks that would break finite differences."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from e2kd import bcos


def cnn(width: int = 6, classes: int = 4, *, seed: int = 0) -> nn.Sequential:
    """Two convolutions, average pooling, one linear layer: the closed form."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, stride=2, padding=1),
        nn.Softplus(),
        nn.Conv2d(width, width, 3, stride=2, padding=1),
        nn.Softplus(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, classes),
    ).double()


class MLPHead(nn.Module):
    """A convolution, functional pooling and two layers: no closed form, a traced head."""

    def __init__(self, width: int = 6, classes: int = 4, *, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.hidden, self.out = nn.Linear(width, width), nn.Linear(width, classes)
        self.double()

    def forward(self, images: Tensor) -> Tensor:
        features = nn.functional.softplus(self.conv2(nn.functional.softplus(self.conv(images))))
        return self.out(nn.functional.softplus(self.hidden(features.mean((2, 3)))))


class SharedActivation(MLPHead):
    """One activation module after every layer, in the trunk and in the head."""

    def __init__(self, width: int = 6, classes: int = 4, *, seed: int = 0) -> None:
        super().__init__(width, classes, seed=seed)
        self.act = nn.Softplus()

    def forward(self, images: Tensor) -> Tensor:
        features = self.act(self.conv2(self.act(self.conv(images))))
        return self.out(self.act(self.hidden(features.mean((2, 3)))))


class Branching(MLPHead):
    """A head that branches on its values, so that only the trainer's own graph can be differentiated."""

    def forward(self, images: Tensor) -> Tensor:
        features = nn.functional.softplus(self.conv2(nn.functional.softplus(self.conv(images))))
        pooled = features.mean((2, 3))
        return self.out(nn.functional.softplus(self.hidden(pooled if pooled.sum() > 0 else -pooled)))


class TinyViT(nn.Module):
    """Patches, a class token, two attention blocks, a head that reads the class token."""

    def __init__(self, width: int = 8, classes: int = 4, *, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.patch = nn.Conv2d(3, width, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, 17, width) / 2)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)
        self.double()

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(images), -1, -1), patches], 1) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class Block(nn.Module):
    """Pre-norm attention with fused attention, and an MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.proj(mixed)
        return x + self.mlp(x)


NETS = {"closed": cnn, "traced": MLPHead, "shared": SharedActivation, "graph": Branching, "class_token": TinyViT}


def bcos_cnn(width: int = 6, classes: int = 4, *, seed: int = 0) -> nn.Sequential:
    """A B-cos network that encodes its images."""
    torch.manual_seed(seed)
    network = bcos.BcosResNet(bcos.BasicBlock, (1,), classes, width=width, small_images=True)
    return nn.Sequential(bcos.AddInverse(), network).double()


BUILD = NETS | {"bcos": bcos_cnn}

# Seeds of student and teacher whose maps for the teacher's top class are alive: these nets are tiny.
SEEDS = {
    "closed": (0, 2), "traced": (2, 1), "shared": (2, 1), "graph": (2, 1), "class_token": (2, 1), "bcos": (0, 2),
}  # fmt: skip


def pair(net: str) -> tuple[nn.Module, nn.Module]:
    """A student and a teacher of one kind."""
    student, teacher = SEEDS[net]
    return BUILD[net](seed=student), BUILD[net](seed=teacher)


def spoil(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
    """A forward hook after which the first image of a batch is NaN."""
    return torch.cat([torch.full_like(output[:1], torch.nan), output[1:]])
