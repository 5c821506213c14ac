"""Walks over the backward graph that a forward pass left."""

from __future__ import annotations

from torch.autograd.graph import Node


def before(end: Node | None, without: Node | None = None) -> list[Node]:
    """The nodes that `end` was computed from, itself first, by ways that don't pass `without`.

    >>> import torch
    >>> x = torch.ones(1, requires_grad=True)
    >>> [node.name() for node in before((2 * x).exp().grad_fn)]
    ['ExpBackward0', 'MulBackward0', 'torch::autograd::AccumulateGrad']
    """
    queue = [node for node in (end,) if node is not None and node is not without]
    seen = {*queue, without, None}
    for node in queue:
        for parent, _ in node.next_functions:
            if parent not in seen:
                seen.add(parent)
                queue.append(parent)  # type: ignore[arg-type]
    return queue


def between(start: Node | None, end: Node | None) -> list[Node]:
    """The nodes of the graph to `end` that were computed from `start`, which is not one of them.

    >>> import torch
    >>> x = torch.ones(1, requires_grad=True).exp()
    >>> [node.name() for node in between(x.grad_fn, (2 * x).sin().grad_fn)]
    ['MulBackward0', 'SinBackward0']
    """
    users: dict[Node | None, list[Node]] = {}
    for node in before(end):
        for parent, _ in node.next_functions:
            users.setdefault(parent, []).append(node)
    queue = list(dict.fromkeys(users.get(start, ())))
    seen = set(queue)
    for node in queue:
        for user in users.get(node, ()):
            if user not in seen:
                seen.add(user)
                queue.append(user)
    return queue
