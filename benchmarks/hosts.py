"""Which ways to train work in which host: python -m benchmarks.hosts

Every cell trains for two epochs, then again from the checkpoint of the first, and compares the weights and their moving
average bit by bit. Writes benchmarks/results/hosts.json.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import ROOT, markdown_table, write_results
from benchmarks.hosts_loops import HOSTS, Cell, State, trained

Row = dict[str, Any]
BACKEND = "inductor"
TITLES = {
    "timm": "timm, `python -m e2kd.trainers.timm`",
    "plain": "plain PyTorch, DistributedDataParallel",
    "accelerate": "Accelerate",
    "transformers": "Hugging Face Trainer",
}


def cells(hosts: list[str] | None = None, *, quick: bool = False) -> list[Cell]:
    """All of them, or those in float32 and eager mode."""
    ways = [("", False)] if quick else list(product(("", BACKEND), (False, True)))
    return [Cell(host, bf16, backend) for host in hosts or HOSTS for backend, bf16 in ways]


def equal(one: State | None, other: State | None) -> bool | None:
    """Whether two states are the same bit by bit; None where there is none."""
    if one is None or other is None:
        return None
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def row(cell: Cell, folder: Path) -> Row:
    """One cell, in this process or as one of several."""
    start = time.perf_counter()
    found: Row = {
        "host": cell.host,
        "precision": "bf16" if cell.bf16 else "fp32",
        "mode": cell.backend or "eager",
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
    }
    try:
        whole = trained(cell, folder / "whole")
        resumed = trained(cell, folder / "resumed", folder / "whole")
    except Exception as error:  # a row of the table, not the end of it
        return found | {"error": f"{type(error).__name__}: {error}"}
    found["resume"] = equal(whole.student, resumed.student)
    found["ema"] = equal(whole.average, resumed.average)
    found["ema_differs"] = whole.average is None or not equal(whole.average, whole.student)
    return found | {"seconds": round(time.perf_counter() - start, 1)}


def in_this_process(todo: list[Cell], folder: Path) -> list[Row]:
    """A row for each cell."""
    rows = []
    for cell in todo:
        rows.append(row(cell, folder / f"{cell.host}{cell.bf16:d}{cell.backend}"))
        if int(os.environ.get("RANK", 0)) == 0:
            print(rows[-1], flush=True)
    return rows


def in_two_processes(todo: list[Cell], folder: Path) -> list[Row]:
    """The rows of two processes, which have to agree. Raises if one fails or hangs."""
    told = [f"{cell.host},{cell.bf16:d},{cell.backend}" for cell in todo]
    codes = start_two(["-m", "benchmarks.hosts", "--worker", str(folder), *told])
    assert codes == [0, 0], f"exit codes {codes}"
    ranks = [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]
    for one, other in zip(*ranks, strict=True):
        assert one | {"seconds": 0} == other | {"seconds": 0}, f"the processes differ: {one} {other}"
    rows: list[Row] = ranks[0]
    return rows


def start_two(words: list[str], timeout: float = 1800) -> list[int]:
    """Run Python with these words as two processes of one group; their exit codes. Raises if one hangs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(2):
        where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "OMP_NUM_THREADS": 1}
        where |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": ROOT}
        environment = os.environ | {name: str(value) for name, value in where.items()}
        processes.append(subprocess.Popen([sys.executable, *words], cwd=ROOT, env=environment))
    try:
        return [process.wait(timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()


def worker(folder: Path, told: list[str]) -> None:
    """One of the two processes."""
    torch.set_num_threads(1)
    words = [each.split(",") for each in told]
    rows = in_this_process([Cell(host, bf16 == "1", backend) for host, bf16, backend in words], folder)
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(rows), encoding="utf-8")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def works(row: Row) -> bool:
    """Whether the resumed run ended with the weights, and the average, of the uninterrupted one."""
    return bool(row.get("resume")) and row["ema"] is not False and row["ema_differs"]


def table(rows: list[Row]) -> str:
    """Host x precision and mode: the numbers of processes with which a resumed run is the uninterrupted one."""
    ways = list(dict.fromkeys((row["precision"], row["mode"]) for row in rows))
    lines: list[list[Any]] = []
    for host in dict.fromkeys(row["host"] for row in rows):
        mine = [row for row in rows if row["host"] == host]
        cells = [[r for r in mine if (r["precision"], r["mode"]) == way] for way in ways]
        counts = [", ".join(str(r["processes"]) for r in cell if works(r)) or "no" for cell in cells]
        average = "none of its own" if all(r.get("ema") is None for r in mine) else "equal"
        lines.append([TITLES[host], *counts, average])
    return markdown_table(["processes", *(f"{precision}, {mode}" for precision, mode in ways), "EMA"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hosts", nargs="+", choices=list(HOSTS))
    parser.add_argument("--quick", action="store_true", help="float32 and eager mode alone; writes no results")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    if args.worker:
        worker(Path(args.worker[0]), args.worker[1:])
        return
    todo = cells(args.hosts, quick=args.quick)
    with tempfile.TemporaryDirectory() as folder:
        rows = in_this_process(todo, Path(folder) / "one") + in_two_processes(todo, Path(folder))
    if not args.quick:
        print(write_results("hosts", rows))


if __name__ == "__main__":
    main()
