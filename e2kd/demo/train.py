"""Nets of four convolutions, and one training loop for every arm of the comparison."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor, nn

BATCH = 50
LEARNING_RATE = 3e-3  # the peak of the one-cycle schedule
Criterion = Callable[[Tensor, Any], Tensor]
Feed = Callable[[Tensor], tuple[Tensor, Any]]  # indices of a batch -> images and targets


def conv_block(channels_in: int, channels_out: int, stride: int) -> nn.Sequential:
    """Convolution 3x3, BatchNorm, ReLU."""
    convolution = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels_out), nn.ReLU(inplace=True))


def small_net(width: int, seed: int, classes: int = 2) -> nn.Sequential:
    """Four convolutions, average pooling and a linear layer: images [B, 3, 32, 32] -> logits [B, classes].

    The features that are pooled are [B, 4 * width, 8, 8]. Same seed, same weights, whatever was drawn before.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        features = nn.Sequential(
            conv_block(3, width, 1),
            conv_block(width, 2 * width, 2),
            conv_block(2 * width, 4 * width, 2),
            conv_block(4 * width, 4 * width, 1),
        )
        head = nn.Linear(4 * width, classes)
    pool, flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    net = nn.Sequential(OrderedDict(features=features, pool=pool, flatten=flatten, head=head))
    return net.to(memory_format=torch.channels_last)  # a sixth faster on a CPU


def batches(count: int, epochs: int, seed: int) -> list[Tensor]:
    """Indices of the batches of a whole training: full batches only, a new order every epoch.

    >>> [len(batch) for batch in batches(120, epochs=2, seed=0)]
    [50, 50, 50, 50]
    """
    generator = Generator().manual_seed(seed)
    orders = [torch.randperm(count, generator=generator) for _ in range(epochs)]
    return [batch for order in orders for batch in order.split(BATCH) if len(batch) == BATCH]


def train(
    model: nn.Module,
    criterion: Criterion,
    feed: Feed,
    plan: list[Tensor],
    seed: int,
    advance: Callable[[], None] = lambda: None,
    *,
    learning_rate: float = LEARNING_RATE,
) -> None:
    """Trains the model in place and leaves it in eval mode; `advance` is called after every step.

    AdamW with a one-cycle schedule. The seed fixes what the feed draws, so that two students trained with the same
    plan and seed see the same images at every step, whatever their criterion.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _steps(model, criterion, feed, plan, advance, learning_rate)
    model.eval()


def _steps(
    model: nn.Module,
    criterion: Criterion,
    feed: Feed,
    plan: list[Tensor],
    advance: Callable[[], None],
    learning_rate: float,
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=len(plan))
    model.train()
    for batch in plan:
        images, targets = feed(batch)
        loss = criterion(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        advance()
