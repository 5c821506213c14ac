"""The rivals' losses, slowly, from the papers' formulas: loops over samples, channels and cells, nothing of e2kd.

Features come as lists of maps [B, C, h, w]; trainable parts are read off the criterion by name, and run by hand.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def heard(model: nn.Module, images: Tensor, layers: list[str]) -> tuple[Tensor, list[Tensor]]:
    """Logits, and what these modules return ("<name"  for what one is given), copied before anything changes it."""
    kept: dict[str, Tensor] = {}

    def out(name: str):
        return lambda module, args, output: kept.__setitem__(name, output.clone())

    def before(name: str):
        return lambda module, args: kept.__setitem__(name, args[0].clone())

    handles = []
    for name in layers:
        module = model.get_submodule(name.removeprefix("<"))
        register = module.register_forward_pre_hook if name[0] == "<" else module.register_forward_hook
        handles.append(register(before(name) if name[0] == "<" else out(name)))
    logits = model(images)
    for handle in handles:
        handle.remove()
    return logits, [kept[name] for name in layers]


def unit(values: list[Tensor]) -> list[Tensor]:
    length = sum(v * v for v in values) ** 0.5
    return [v / length for v in values]


def strength(features: Tensor) -> list[Tensor]:
    """Sums over channels of the squares, cell by cell, of one sample [C, h, w]."""
    _, height, width = features.shape
    return [sum(c[i, j] ** 2 for c in features) for i in range(height) for j in range(width)]


def at(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    total = 0.0
    for mine, theirs in zip(student, teacher, strict=True):
        for one, other in zip(mine, theirs, strict=True):
            a, b = unit(strength(one)), unit(strength(other))
            total = total + sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / len(a) / len(mine)
    return total


def fitnets(regressor: nn.Conv2d, student: Tensor, teacher: Tensor) -> Tensor:
    weight, bias = regressor.weight, regressor.bias
    _, _, height, width = weight.shape
    total = 0.0
    for b, o, i, j in torch.cartesian_prod(*(torch.arange(n) for n in teacher.shape)).tolist():
        total = (
            total
            + ((weight[o] * student[b, :, i : i + height, j : j + width]).sum() + bias[o] - teacher[b, o, i, j]) ** 2
        )
    return total / teacher.numel()


def batch_normed(x: Tensor, norm: nn.Module) -> Tensor:
    """Batch norm in train mode over all but the second axis."""
    axes = [a for a in range(x.ndim) if a != 1]
    mean, variance = x.mean(axes, keepdim=True), x.var(axes, keepdim=True, unbiased=False)
    shape = [-1 if a == 1 else 1 for a in range(x.ndim)]
    return (x - mean) / (variance + norm.eps).sqrt() * norm.weight.view(shape) + norm.bias.view(shape)


def overhaul(connectors: nn.ModuleList, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """Of the first batch, whose negative values alone make the margins."""
    total, stages = 0.0, len(student)
    for i in range(stages):
        convolution, norm = connectors[i]
        mine = torch.einsum("oc,bchw->bohw", convolution.weight[:, :, 0, 0], student[i])
        mine = batch_normed(mine, norm)
        for c in range(teacher[i].shape[1]):
            values = teacher[i][:, c]
            negative = values[values < 0]
            margin = negative.mean() if len(negative) else values.new_zeros(())
            for s, t in zip(mine[:, c].flatten(), values.flatten(), strict=True):
                t = t if t > margin else margin
                total = total + (0 if s <= t <= 0 else (s - t) ** 2 / 2 ** (stages - 1 - i)) / len(values)
    return total


def averaged(x: Tensor, side: int) -> Tensor:
    """Means over equal blocks, for sides that divide."""
    return x.unflatten(3, (side, -1)).unflatten(2, (side, -1)).mean((3, 5))


def context(student: Tensor, teacher: Tensor) -> Tensor:
    side = student.shape[2]
    levels = [side, *(s for s in (4, 2, 1) if s < side)]
    weights = [0.5**n for n in range(len(levels))]
    errors = [((averaged(student, s) - averaged(teacher, s)) ** 2).mean() for s in levels]
    return sum(w * e for w, e in zip(weights, errors, strict=True)) / sum(weights)


def repeated(x: Tensor, grid: torch.Size) -> Tensor:
    """Nearest neighbours, for sides that divide."""
    return x.repeat_interleave(grid[0] // x.shape[2], 2).repeat_interleave(grid[1] // x.shape[3], 3)


def review(fusions: nn.ModuleList, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    total, deeper = 0.0, None
    for fusion, mine, theirs in list(zip(fusions, student, teacher, strict=True))[::-1]:
        x = torch.einsum("oc,bchw->bohw", fusion.reduce[0].weight[:, :, 0, 0], mine)
        x = batch_normed(x, fusion.reduce[1])
        if deeper is not None:
            y = repeated(deeper, x.shape[2:])
            scores = torch.einsum("oc,bchw->bohw", fusion.attend.weight[:, :, 0, 0], torch.cat([x, y], 1))
            gates = 1 / (1 + (-scores - fusion.attend.bias[:, None, None]).exp())
            x = x * gates[:, 0:1] + y * gates[:, 1:2]
        out = batch_normed(nn.functional.conv2d(x, fusion.expand[0].weight, padding=1), fusion.expand[1])
        total, deeper = total + context(out, theirs), x
    return total


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return x @ layer.weight.T + layer.bias


def afd(matching: nn.Module, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    width, count = matching.width, len(student[0])
    queries = [batch_normed(linear(q[0], t.mean((2, 3))), q[1]) for q, t in zip(matching.queries, teacher, strict=True)]
    keys = [
        batch_normed(linear(k[0][0], s.mean((2, 3))), k[0][1]).clamp(min=0)
        for k, s in zip(matching.keys, student, strict=True)
    ]
    stacked = torch.stack([k[b] for b in range(count) for k in keys])  # batch norm sees all samples and layers at once
    seen = batch_normed(linear(matching.bilinear[0], stacked), matching.bilinear[1])
    total = 0.0
    for b in range(count):
        for t in range(len(teacher)):
            scores = []
            for s in range(len(student)):
                key = seen[b * len(student) + s, t * width : (t + 1) * width]
                place = (matching.teacher_positions[t] * matching.student_positions[s]).sum()
                scores.append(((key * queries[t][b]).sum() + place) / math.sqrt(width))
            exponentials = [score.exp() for score in scores]
            theirs = unit(strength(teacher[t][b]))
            for s in range(len(student)):
                squares = student[s][b].square().mean(0)[None, None]
                grid = teacher[t].shape[2]
                on_grid = averaged(squares, grid) if squares.shape[2] >= grid else repeated(squares, (grid, grid))
                mine = unit(list(on_grid.flatten()))
                error = sum((x - y) ** 2 for x, y in zip(mine, theirs, strict=True)) / len(mine)
                total = total + exponentials[s] / sum(exponentials) * error / count
    return total


def crd(
    student: Tensor,
    teacher: Tensor,
    memories: tuple[Tensor, Tensor],
    columns: Tensor,
    temperature: float,
    z: list[float],
) -> tuple[Tensor, list[float]]:
    """Embeddings [B, d] of unit length, both memories [M, d], samples to compare with [B, 1 + N]; a negative z is set.

    The student is compared with the teacher's memory and the other way round.
    """
    count, total = len(memories[0]), 0.0
    noise = (columns.shape[1] - 1) / count
    for way, (anchor, memory) in enumerate(((student, memories[1]), (teacher, memories[0]))):
        rows = [[((anchor[b] * memory[c]).sum() / temperature).exp() for c in row] for b, row in enumerate(columns)]
        if z[way] < 0:
            z[way] = sum(float(v.detach()) for row in rows for v in row) / columns.numel() * count
        for row in rows:
            h = [v / z[way] / (v / z[way] + noise) for v in row]
            total = total - (h[0].log() + sum((1 - x).log() for x in h[1:])) / len(columns)
    return total, z


def cat(student: Tensor, teacher: Tensor, weights: tuple[Tensor, Tensor], side: int, normalize: bool) -> Tensor:
    total, classes = 0.0, len(weights[0])
    for b in range(len(student)):
        for k in range(classes):
            maps = [
                list(averaged((weight[k][:, None, None] * features[b]).sum(0)[None, None], side).flatten())
                for features, weight in zip((student, teacher), weights, strict=True)
            ]
            a, b_ = (unit(m) if normalize else m for m in maps)
            total = total + sum((x - y) ** 2 for x, y in zip(a, b_, strict=True)) / len(a)
    return total / classes / len(student)


def dkd(student: Tensor, teacher: Tensor, labels: Tensor, alpha: float, beta: float, temperature: float) -> Tensor:
    total = 0.0
    for s, t, label in zip(student / temperature, teacher / temperature, labels.tolist(), strict=True):
        q, p = s.exp() / s.exp().sum(), t.exp() / t.exp().sum()
        target = p[label] * (p[label] / q[label]).log() + (1 - p[label]) * ((1 - p[label]) / (1 - q[label])).log()
        others = [k for k in range(len(s)) if k != label]
        p_hat, q_hat = p[others] / (1 - p[label]), q[others] / (1 - q[label])
        total = total + alpha * target + beta * (p_hat * (p_hat / q_hat).log()).sum()
    return total / len(labels) * temperature**2
