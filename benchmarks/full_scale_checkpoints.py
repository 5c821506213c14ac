"""What a run at full scale leaves in its folder, and whether a command may go on with it."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.common import write_json
from benchmarks.paired import Row
from e2kd.frozen.settings import differences

CHECKPOINTS, RESULT, SETTINGS = "checkpoints", "result.json", "settings.json"


def checkpoints(folder: Path) -> list[Path]:
    """Complete ones of a run's folder, oldest first."""
    return sorted((folder / CHECKPOINTS).glob("epoch_*"), key=epoch_of)


def epoch_of(checkpoint: Path) -> int:
    """The last epoch that it has seen."""
    return int(checkpoint.name.removeprefix("epoch_"))


def result_of(folder: Path, settings: Row) -> Row:
    """The result that a folder has; empty where there is none.

    Raises:
        SystemExit: when it is another student's, or its checkpoints are.
    """
    found = _read(folder / RESULT)
    if found:
        check(found["settings"], settings, folder, RESULT)
    elif checkpoints(folder):
        check(_begun(folder)["settings"], settings, folder, CHECKPOINTS)
    return found


def begin(folder: Path, about: Row, *, write: bool) -> None:
    """One process writes what a student is made of beside its checkpoints: settings, the weights of its teacher, and
    the number of processes, each of which has its own share of a batch, statistics and random numbers.

    Raises:
        SystemExit: when there are checkpoints of another student.
    """
    if checkpoints(folder):
        check(_begun(folder), about, folder, CHECKPOINTS)
    if write:
        write_json(folder / CHECKPOINTS / SETTINGS, about)


def check(found: Row, wanted: Row, folder: Path, what: str) -> None:
    """Raise a SystemExit that names all settings that differ, unless they are the same."""
    apart = differences(found, wanted)
    if apart:
        raise SystemExit(
            f"{folder} has {what} with other settings: {'; '.join(apart)}. Move the folder away, or name another --out."
        )


def _begun(folder: Path) -> Row:
    found = _read(folder / CHECKPOINTS / SETTINGS)
    if not found:
        raise SystemExit(
            f"{folder} has {CHECKPOINTS} without the {SETTINGS} that say of which student they are. Move the folder "
            "away, or name another --out."
        )
    return found


def _read(path: Path) -> Row:
    found: Row = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found
