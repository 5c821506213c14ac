"""How often a monitor may run, and for how long."""

from __future__ import annotations

import time
from collections.abc import Callable


class Budget:
    """Decides when the next probe is due, and when one has taken too long.

    Args:
        every: probe at the first question and at multiples of so many steps, or after as many questions; whichever is
            reached first, so that steps counted anew in every epoch are no obstacle.
        max_seconds: of one probe; what is left of it then is skipped.
        max_share: of the time since the first call that all probes together may take; they come later where `every`
            would exceed it. None lets `every` alone decide.
        clock: seconds.

    >>> now = [0.0]
    >>> budget = Budget(every=10, max_share=0.1, clock=lambda: now[0])
    >>> budget.due(0)  # the first is free
    True
    >>> budget.begin(0); now[0] = 5.0; budget.end()
    >>> now[0] = 60.0; budget.due(10)  # 5 seconds more would be 10 of 60
    False
    >>> now[0] = 100.0; budget.due(11)
    True
    """

    def __init__(
        self,
        every: int = 500,
        max_seconds: float | None = None,
        max_share: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if every < 1 or (max_seconds is not None and max_seconds <= 0) or (max_share is not None and max_share <= 0):
            raise ValueError(
                f"Expected every >= 1 and max_seconds and max_share above 0 or None, but got {every}, {max_seconds} "
                f"and {max_share}."
            )
        self.every, self.max_seconds, self.max_share, self.clock = every, max_seconds, max_share, clock
        self.born: float | None = None
        self.step: int | None = None  # of the last probe
        self.asked = 0  # times since then
        self.started = self.spent = self.last = 0.0

    @property
    def share(self) -> float:
        """Of the time since the first call that probes have taken, in [0, 1]."""
        elapsed = 0.0 if self.born is None else self.clock() - self.born
        return self.spent / elapsed if elapsed > 0 else 0.0

    def steps_passed(self, step: int) -> bool:
        """Whether a multiple of `every` has come since the last probe, so that a run that was resumed probes where one
        would that was not, or as many questions; a smaller step than that one is a new run."""
        if self.born is None:
            self.born = self.clock()
        self.asked += 1
        if self.step is None or step < self.step or self.asked >= self.every:
            return True
        return step // self.every > self.step // self.every

    def affordable(self) -> bool:
        """Whether another probe like the last keeps within `max_share`."""
        if self.max_share is None or self.step is None or self.born is None:
            return True
        return self.spent + self.last <= self.max_share * (self.clock() - self.born)

    def due(self, step: int) -> bool:
        """Whether to probe at this step."""
        return self.steps_passed(step) and self.affordable()

    def begin(self, step: int) -> None:
        """A probe starts."""
        self.step, self.asked, self.started = step, 0, self.clock()

    def over(self) -> bool:
        """Whether this probe has used its time."""
        return self.max_seconds is not None and self.clock() - self.started > self.max_seconds

    def end(self) -> None:
        """The probe is done."""
        self.last = self.clock() - self.started
        self.spent += self.last
