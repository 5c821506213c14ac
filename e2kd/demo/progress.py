"""Two bars while the demo runs: everything, and the stage at hand, each with the time left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID


class Tracker:
    """Progress over stages of known cost; a stage's cost is in seconds of a usual laptop, for the bars alone."""

    def __init__(self, progress: Progress, whole: TaskID) -> None:
        self.progress, self.whole = progress, whole

    @contextmanager
    def stage(self, name: str, steps: int, cost: float) -> Iterator[Callable[[], None]]:
        """One stage; call what it yields after each of its steps."""
        current = self.progress.add_task(name, total=steps)

        def advance() -> None:
            self.progress.advance(current)
            self.progress.advance(self.whole, cost / steps)

        yield advance
        self.progress.remove_task(current)


@contextmanager
def tracking(console: Console, cost: float) -> Iterator[Tracker]:
    """Shows the bars of a job of the whole cost; where there is no terminal, nothing but what is printed."""
    from rich import progress as bars

    columns = (
        bars.TextColumn("{task.description:<22}"),
        bars.BarColumn(),
        bars.TaskProgressColumn(),
        bars.TimeElapsedColumn(),
        bars.TextColumn("left"),
        bars.TimeRemainingColumn(compact=True),
    )
    quiet = not console.is_terminal
    shown = bars.Progress(*columns, console=console, transient=True, disable=quiet, speed_estimate_period=90)
    with shown:
        yield Tracker(shown, shown.add_task("[bold]everything", total=cost))
