"""The parts of the loss in timm's log line and summary.csv."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import timm.utils
import torch.distributed as dist
from torch import Tensor

from e2kd.trainers.averages import Averages, means
from e2kd.trainers.timm.replacing import replaced

LINE = "Train: "  # how timm's train.py begins the line it logs while training


class Logs:
    """Means since the last summary, over steps and processes, where timm says what the loss is.

    timm averages its loss over processes just before it logs it, in every process; there the parts are averaged too.
    """

    def __init__(self) -> None:
        self.averages: Averages | None = None
        self.epoch: Tensor | None = None  # sums and counts

    def watch(self, averages: Averages) -> None:
        """Show these."""
        self.averages = averages

    def gather(self) -> None:
        """Bring the sums up to date. Every process has to call it."""
        new = None if self.averages is None else self.averages.sums_of_all()
        if new is not None:
            self.epoch = new if self.epoch is None else self.epoch + new

    def values(self) -> dict[str, float]:
        """All parts, nan for those that there were none of: summary.csv has one header for all epochs."""
        if not (dist.is_available() and dist.is_initialized()):
            self.gather()
        names = () if self.averages is None else self.averages.names
        found = {} if self.epoch is None else means(names, self.epoch)
        return {name: found.get(name, math.nan) for name in names}

    @contextmanager
    def shown(self) -> Iterator[None]:
        """timm's log shows the parts inside."""
        utils: Any = timm.utils
        logger, reduce_tensor, update_summary = logging.getLogger("train"), utils.reduce_tensor, utils.update_summary

        def reduce(*args: Any, **kwargs: Any) -> Any:
            self.gather()
            return reduce_tensor(*args, **kwargs)

        def update(epoch: int, train_metrics: dict[str, float], *args: Any, **kwargs: Any) -> Any:
            train_metrics.update(self.values())  # the script prints the same dict when it is done
            self.epoch = None
            return update_summary(epoch, train_metrics, *args, **kwargs)

        logger.addFilter(self.extend)
        try:
            with replaced(utils, "reduce_tensor", reduce), replaced(utils, "update_summary", update):
                yield
        finally:
            logger.removeFilter(self.extend)

    def extend(self, record: logging.LogRecord) -> bool:
        """A filter that lets everything pass, and adds the parts to the line about training."""
        if isinstance(record.msg, str) and record.msg.startswith(LINE) and self.averages is not None:
            shown = "  ".join(f"{name.replace('_', ' ').capitalize()}: {v:#.3g}" for name, v in self.values().items())
            record.msg = f"{record.msg}  {shown}"
        return True
