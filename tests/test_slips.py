"""Slips that are easily made are told of where they are made: when a thing is built, in the words of its options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from nets import cnn
from torch import nn

import e2kd
from e2kd.baselines import AFD, AT, Overhaul, ReviewKD
from e2kd.transfer import layer_features, read

X = torch.rand(4, 3, 16, 16, dtype=torch.float64)


def monitor(**settings: Any) -> e2kd.TransferMonitor:
    return e2kd.TransferMonitor(cnn(), cnn(8), X, lambda scalars, step: None, **settings)


@pytest.mark.parametrize("option", ["layers", "teacher_layers"])
@pytest.mark.parametrize("rival", [AFD, AT, Overhaul, ReviewKD])
def test_one_name_is_no_list_of_layers(rival: Any, option: str) -> None:
    with pytest.raises(TypeError, match=rf"Expected {option} to be a list .* Pass {option}=\['1'\]"):
        rival(cnn(), "a timm name that is never asked for", **{option: "1"})


@pytest.mark.parametrize(
    "call",
    [
        lambda: e2kd.unicam(cnn(), cnn(8), X, layers="1"),
        lambda: layer_features(cnn(), cnn(8), X, layers="1"),
        lambda: read(cnn(), X, "1"),
        lambda: monitor(layers="1"),
    ],
    ids=["unicam", "layer_features", "read", "monitor"],
)
def test_one_name_is_no_list_of_layers_to_look_at(call: Callable[[], object]) -> None:
    with pytest.raises(TypeError, match=r"Expected layers to be a list of names, but got '1'\. Pass layers=\['1'\]"):
        call()


def test_one_name_is_no_list_in_a_method_of_ones_own() -> None:
    class Own(AT):
        def __init__(self, student: nn.Module, teacher: nn.Module, layers: Any) -> None:
            super(AT, self).__init__(student, teacher, None, 1.0, lambda pair: pair.stages(layers, None))

    with pytest.raises(TypeError, match=r"Pass layers=\['1'\]"):
        Own(cnn(), cnn(8), "1")
