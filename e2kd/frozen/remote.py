"""Caches that lie elsewhere are brought to local disk before they are read."""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path
from typing import Any

from e2kd.folders import cache_folder
from e2kd.frozen.files import publish
from e2kd.frozen.fingerprints import digest
from e2kd.frozen.manifest import MANIFEST
from e2kd.frozen.progress import progress_bar

FILE = re.compile(r"plan\.json|manifest\.json|shard-\d{6,}\.safetensors")  # nothing else of a remote folder is touched
BEGUN = "manifest.json.begun"  # the manifest of the cache whose files are being brought


def brought_here(path: str | Path, to: str | Path | None = None) -> Path:
    """A local folder with the cache: the path itself, or what was downloaded from a URL.

    What was downloaded before is not downloaded again, unless the remote cache is another one now.

    Args:
        path: a folder, or a URL that fsspec knows.
        to: where to download; a folder in $E2KD_CACHE, else in e2kd of $XDG_CACHE_HOME or ~/.cache, if None.

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
    folder = Path(to) if to is not None else cache_folder() / digest(str(path).encode() + manifest)
    folder.mkdir(parents=True, exist_ok=True)
    if not _is_of(folder, manifest):
        _remove_cache(folder)
        publish(folder / BEGUN, manifest)
    todo = {name: size for name, size in sizes.items() if name != MANIFEST and not _is_there(folder / name, size)}
    with progress_bar("downloading", sum(s or 0 for s in todo.values()), shown=bool(todo), unit="bytes") as advance:
        for name, size in todo.items():
            _put(folder / name, files, f"{root}/{name}")
            advance(size or 0)
    publish(folder / MANIFEST, manifest)  # last: a download that was cut off has none
    (folder / BEGUN).unlink(missing_ok=True)
    return folder


def _remote_sizes(files: Any, root: str) -> dict[str, int | None]:
    """The cache's files with their sizes; None of a size that the server does not list, as over HTTP."""
    listed = {entry["name"].rstrip("/").rsplit("/", 1)[-1]: entry["size"] for entry in files.ls(root, detail=True)}
    return {n: None if size is None else int(size) for n, size in sorted(listed.items()) if FILE.fullmatch(n)}


def _is_of(folder: Path, manifest: bytes) -> bool:
    """Whether the files in a folder are those of this very cache: sizes alone don't tell two teachers' apart."""
    return any((folder / n).exists() and (folder / n).read_bytes() == manifest for n in (MANIFEST, BEGUN))


def _remove_cache(folder: Path) -> None:
    """Remove the files of another cache, the manifest first: without it there is none."""
    for name in sorted(path.name for path in folder.iterdir() if FILE.fullmatch(path.name)):
        (folder / name).unlink(missing_ok=True)


def _is_there(path: Path, size: int | None) -> bool:
    """Whether a file is here and of the size, where that is known; files have their names when they are whole."""
    return path.exists() and size in (None, path.stat().st_size)


def _put(path: Path, files: Any, source: str) -> None:
    """A file that has its name when it is whole."""
    part = path.with_name(f"{path.name}.download.{secrets.token_hex(4)}")
    try:
        files.get_file(source, str(part))
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
