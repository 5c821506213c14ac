"""What every benchmark needs: where its results go and what machine they come from."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "torchvision", "timm", "transformers")


def environment() -> dict[str, Any]:
    """Versions, machine, threads, commit and date: what a number needs to be repeated."""
    return {
        **{name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """The checked-out commit, with "+" after it when files differ from it."""
    try:
        name = _git("rev-parse", "--short", "HEAD")
        return name + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def command() -> str:
    """The command line of this process, as a shell takes it."""
    return shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]])


def write_json(path: Path, data: Any) -> Path:
    """Write JSON at once or not at all, so that a benchmark that is killed leaves its last good file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(path.suffix + ".part")
    partial.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)
    return path


def write_results(name: str, rows: list[dict[str, Any]], **more: Any) -> Path:
    """`benchmarks/results/<name>.json` with the environment, anything else worth keeping, and one row per case."""
    return write_json(RESULTS / f"{name}.json", {"environment": environment(), **more, "rows": rows})


def read_rows(name: str) -> list[dict[str, Any]]:
    """The rows of an earlier run, none if there was none."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return rows


def between(found: dict[str, Any], unit: str, digits: int = 2) -> str:
    """A median with its quartiles.

    >>> between({"median": 1.5, "quartiles": [1.25, 1.75]}, "x")
    '1.50x (1.25-1.75)'
    """
    low, high = found["quartiles"]
    return f"{found['median']:.{digits}f}{unit} ({low:.{digits}f}-{high:.{digits}f})"


def markdown_table(header: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table; None is an empty cell."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    text = f"{value:.2g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
