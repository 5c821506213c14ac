"""torchmetrics, or what to do to have it."""

from __future__ import annotations

from itertools import count
from typing import Any

import torch

try:
    from torchmetrics import Metric as Metric
except ImportError as error:
    raise ImportError('e2kd.metrics needs torchmetrics: pip install "e2kd[metrics]"') from error

_numbers = count()


class Apart(Metric):
    """A metric that a MetricCollection does not take for another whose states are alike after the first batch.

    It has a state of a name of its own, which is of nothing: it is neither saved nor merged.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.own = f"own_{next(_numbers)}"
        self.add_state(self.own, torch.zeros(()), dist_reduce_fx="sum")

    def persistent(self, mode: bool = False) -> None:
        """Whether states are saved."""
        super().persistent(mode)
        self._persistent[self.own] = False

    def merge_state(self, incoming_state: Any) -> None:
        """Add what another metric of the same kind, or its `metric_state`, has seen."""
        if isinstance(incoming_state, type(self)):
            incoming_state = incoming_state.metric_state
        if isinstance(incoming_state, dict):
            incoming_state = {**incoming_state, self.own: getattr(self, self.own)}
        super().merge_state(incoming_state)
        self._computed = None  # what was computed before is of the samples that were there then

    def _load_from_state_dict(self, *args: Any, **settings: Any) -> None:
        """What `load_state_dict` calls, that of a module around the metric, too."""
        super()._load_from_state_dict(*args, **settings)
        self._computed = None
