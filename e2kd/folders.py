"""Folders: where e2kd keeps what it need not make or download again, and where it is told to write."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """$E2KD_CACHE, else $XDG_CACHE_HOME/e2kd, else ~/.cache/e2kd; it may not exist yet."""
    own, everybodys = os.environ.get("E2KD_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return (Path(own) if own else Path(everybodys or "~/.cache") / "e2kd").expanduser()


def make_folder(folder: Path) -> None:
    """Make a folder and see that it can be written to, before anything long begins.

    Raises:
        OSError: when there can be none.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"Expected a folder that can be written to, but {folder} can't be one: {error}.") from error
