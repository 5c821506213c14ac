"""The control: a model of the same architecture that never learned anything."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from e2kd.modes import device_of, undrawn, unwrap

STREAM = 0x5EED0000  # far from the seeds people train with: a control with the student's own first weights is none


def untrained(model: nn.Module, seed: int = 0) -> nn.Module:
    """A copy of a model with its weights drawn anew: what FSS and RS come to without any training.

    Early layers mostly hand on the geometry of the images, so that a trained network is alike to an untrained one there
    (R* of .7 to .96 on digits). An FSS says something only above that of this control.

    Every module draws its weights as when it was made (`reset_parameters`). Parameters that no module draws, such as
    class tokens and position embeddings, are normal with their own mean and spread. The global random state stays as
    it is.

    >>> net = nn.Linear(3, 2)
    >>> untrained(net).weight.equal(net.weight), untrained(net).weight.equal(untrained(net).weight)
    (False, True)
    """
    made = copy.deepcopy(unwrap(model))
    with undrawn(device_of(made, torch.device("cpu"))), torch.no_grad():
        torch.manual_seed(STREAM + seed)
        for module in made.modules():
            _draw(module)
    return made.eval()


def _draw(module: nn.Module) -> None:
    """New values for the parameters of a module itself, not of its children."""
    before = {name: parameter.clone() for name, parameter in module.named_parameters(recurse=False)}
    if callable(reset := getattr(module, "reset_parameters", None)):
        reset()
    for name, parameter in module.named_parameters(recurse=False):
        # a reset draws `weight` alone, where spectral_norm of old computes that from another parameter
        if parameter.equal(before[name]) and _varies(parameter):
            parameter.normal_(parameter.mean().item(), parameter.std().item())


def _varies(parameter: Tensor) -> bool:
    return parameter.is_floating_point() and bool((parameter != parameter.flatten()[:1]).any())
