"""A small cache whose rows are known, and processes that write it and may be killed at any moment."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from e2kd.frozen.fingerprints import hash_ids, id_hash
from e2kd.frozen.records import Record, Rows
from e2kd.frozen.store import Store
from e2kd.frozen.writer import Writer

CLASSES, SAMPLES, SHARD_ROWS = 5, 46, 4
RECORD = Record(CLASSES, map_shape=(1, 2, 3))
IDS = np.array([id_hash(f"images/{i}.png") for i in range(SAMPLES)], dtype=np.uint64)


def settings(**changes: Any) -> dict[str, Any]:
    """A plan; `changes` replace its keys."""
    dataset = {"samples": SAMPLES, "ids_hash": hash_ids(IDS), "class_names": None}
    plan = {"teacher": {"name": "net", "weights": "ab"}, "explainer": {"name": "GradCAM", "layer": "layer4"}}
    return plan | {"classes": "teacher", "dataset": dataset, "shard_rows": SHARD_ROWS, "batch_size": 2} | changes


def answers(rows: Sequence[int], record: Record = RECORD) -> dict[str, np.ndarray]:
    """What a teacher says about these samples, encoded: a function of the row and nothing else. Row 7 is a dead map."""
    z = torch.stack([torch.randn(record.num_classes, generator=_dice(i)) for i in rows])
    maps = None
    if record.map_shape is not None:
        shape = record.map_shape
        maps = torch.stack([torch.rand(shape, generator=_dice(i + 10**6)) * 2**i * (i != 7) for i in rows])
    return record.encode(z, maps, z.argmax(1), IDS[list(rows)])


def _dice(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def expected(rows: Sequence[int], record: Record = RECORD) -> Rows:
    """The rows as a store should give them, without a disk in between."""
    return record.decode(answers(rows, record))


def write(
    folder: Path | str, rank: int = 0, world: int = 1, record: Record = RECORD, plan: dict[str, Any] | None = None
) -> bool:
    """One process's share; whether the cache is complete then."""
    writer = Writer(folder, plan or settings(), record, rank, world)
    for index in writer.todo():
        writer.write(index, answers(writer.rows(index), record))
    return writer.finish()


def write_and_die(folder: str, rank: int, world: int, operation: int) -> None:
    """As `write`, but killed just before a file operation: the first is number 0."""
    left = [operation]

    def killer(act: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return act(*args, **kwargs)

        return counted

    os.fsync, os.replace, os.link = killer(os.fsync), killer(os.replace), killer(os.link)
    write(folder, rank, world)


def contents(folder: Path) -> dict[str, str]:
    """Every file of a folder, by the hash of its bytes."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def same(found: Rows, wanted: Rows) -> bool:
    """Whether two reads gave the same rows, to the last bit."""
    tensors = all(torch.equal(a, b) for a, b in zip(found[:3], wanted[:3], strict=True))
    return tensors and np.array_equal(found.ids, wanted.ids)


class Reading(Dataset[tuple[int, bool]]):
    """Row numbers, and whether the row that a worker read is the right one."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, row: int) -> tuple[int, bool]:
        return row, same(self.store.rows([row]), expected([row]))
