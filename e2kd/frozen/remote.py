"""Caches that lie elsewhere are brought to local disk before they are read."""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path
from typing import Any

from e2kd.frozen.fingerprints import digest
from e2kd.frozen.progress import progress_bar

FILE = re.compile(r"plan\.json|manifest\.json|shard-\d{6,}\.safetensors")  # nothing else of a remote folder is touched
MANIFEST = "manifest.json"


def brought_here(path: str | Path, to: str | Path | None = None) -> Path:
    """A local folder with the cache: the path itself, or what was downloaded from a URL.

    What was downloaded before is not downloaded again, unless the remote cache is another one now.

    Args:
        path: a folder, or a URL that fsspec knows.
        to: where to download; a folder of the user's cache directory if None.

    Raises:
        FileNotFoundError: for a URL without a finished cache.

    >>> brought_here("cache")
    PosixPath('cache')
    """
    if "://" not in str(path):
        return Path(path)
    from fsspec.core import url_to_fs

    files, root = url_to_fs(str(path))
    sizes = _remote_sizes(files, root)
    if MANIFEST not in sizes:
        raise FileNotFoundError(f"Expected a finished cache at {path}, but there is no {MANIFEST} in it.")
    manifest = files.cat_file(f"{root}/{MANIFEST}")
    folder = Path(to) if to is not None else _own_folder(str(path), manifest)
    folder.mkdir(parents=True, exist_ok=True)
    todo = {name: size for name, size in sizes.items() if name != MANIFEST and _size(folder / name) != size}
    with progress_bar("downloading", sum(todo.values()), shown=bool(todo), unit="bytes") as advance:
        for name, size in todo.items():
            _put(folder / name, files, f"{root}/{name}")
            advance(size)
    _put(folder / MANIFEST, files, f"{root}/{MANIFEST}")  # last: a download that was cut off has none
    return folder


def _remote_sizes(files: Any, root: str) -> dict[str, int]:
    listed = {entry["name"].rstrip("/").rsplit("/", 1)[-1]: entry["size"] for entry in files.ls(root, detail=True)}
    return {name: int(size) for name, size in sorted(listed.items()) if FILE.fullmatch(name)}


def _own_folder(url: str, manifest: bytes) -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return base / "e2kd" / digest(url.encode() + manifest)


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.exists() else None


def _put(path: Path, files: Any, source: str) -> None:
    part = path.with_name(f"{path.name}.download.{secrets.token_hex(4)}")
    try:
        files.get_file(source, str(part))
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
