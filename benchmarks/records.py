"""A study's JSON: begun, gone on with, and joined with what another machine trained.

python -m benchmarks.records elsewhere/limited_standard_50.json     # adds its rows and commands to ours
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterable
from pathlib import Path

from benchmarks.common import RESULTS, command, environment, write_json
from benchmarks.paired import Case, Row

GROWS = ("environment", "commands", "rows")  # all else is the same for every row


def path_of(name: str) -> Path:
    """Where a study's rows are."""
    return RESULTS / f"{name}.json"


def existing(names: Iterable[str]) -> list[Row]:
    """The studies of these names that were run."""
    paths = [path_of(name) for name in names]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]


class Record:
    """Rows with the commands that made them, written whole after each row.

    Args:
        name: of the file in benchmarks/results; None writes nothing.
        head: what the rows have in common, `settings` among it. What else the file holds is kept.
        fresh: forgets what was found before.

    Raises:
        SystemExit: when the file has rows with other settings, or of another teacher.
    """

    def __init__(self, name: str | None, head: Row, *, fresh: bool = False) -> None:
        self.path = None if name is None else path_of(name)
        before = {} if fresh or self.path is None else read_study(self.path, head["settings"])
        apart = sorted(key for key in before.keys() & head.keys() if before[key] != json.loads(json.dumps(head[key])))
        if apart:
            raise SystemExit(f"{self.path} has rows with another {' and '.join(apart)}: move it away, or pass --fresh.")
        self.rows: list[Row] = before.get("rows", [])
        self.head = {key: value for key, value in before.items() if key not in GROWS} | head
        self.environment = environment()  # now: asking git while a student's process is forked would wait for it
        self.commands: list[str] = list(dict.fromkeys([*before.get("commands", []), command()]))

    def found(self, rows: list[Row]) -> Row:
        """All that is known, as the file has it."""
        return {"environment": self.environment, "commands": self.commands, **self.head, "rows": rows}

    def write(self, rows: list[Row]) -> None:
        """In the place of what was there."""
        if self.path is not None:
            write_json(self.path, self.found(rows))


def read_study(path: Path, settings: Row) -> Row:
    """What a run that was stopped has written; empty where there is none.

    Raises:
        SystemExit: when it was run with other settings.
    """
    if not path.exists():
        return {}
    found: Row = json.loads(path.read_text(encoding="utf-8"))
    if found["settings"] != settings:
        raise SystemExit(f"{path} has rows with other settings, {found['settings']}: move it away, or pass --fresh.")
    return found


def joined(mine: Row, other: Row) -> Row:
    """One study's rows of two files, ours first; students that both have must be the same.

    Raises:
        ValueError: when the files are of different studies, or a student came out differently.
    """
    apart = [key for key in mine.keys() | other.keys() if key not in GROWS and key != "note"]
    apart = sorted(key for key in apart if mine.get(key) != other.get(key))
    if apart:
        raise ValueError(f"Expected rows of one study, but these files have different {', '.join(apart)}.")
    known = {case_of(row): row for row in mine["rows"]}
    new = []
    for row in other["rows"]:
        twin = known.get(case_of(row))
        if twin is None:
            new.append(row)
        elif _measured(twin) != _measured(row):
            raise ValueError(f"Expected a student once, or twice the same, but both files have {case_of(row)}.")
    commands = list(dict.fromkeys([*mine["commands"], *other["commands"]]))
    return mine | {"commands": commands, "rows": mine["rows"] + new}


def case_of(row: Row) -> Case:
    """The student that a row is of."""
    return Case(*(row[name] for name in Case._fields))


def _measured(row: Row) -> Row:
    return {name: value for name, value in row.items() if name != "cpu_seconds"}


def main() -> None:
    """Command line."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    for path in parser.parse_args().files:
        other, ours = json.loads(path.read_text(encoding="utf-8")), RESULTS / path.name
        mine = json.loads(ours.read_text(encoding="utf-8")) if ours.exists() else other
        print(write_json(ours, joined(mine, other)))


if __name__ == "__main__":
    main()
