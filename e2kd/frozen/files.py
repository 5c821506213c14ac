"""Files that are there whole or not at all, after a kill, a power cut or a full disk."""

from __future__ import annotations

import errno
import os
import re
import secrets
import sys
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

if sys.platform != "win32":
    import fcntl

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EACCES)
NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP)  # network file systems that order their renames themselves
PART = re.compile(r"(shard-\d+\.safetensors|plan\.json|manifest\.json)\.part\.\d+\.[0-9a-f]{8}")


def publish(path: Path, data: bytes, *, first_wins: bool = False) -> None:
    """Write a file so that it has all of its bytes from the moment its name exists.

    Args:
        path: the file; its folder exists.
        data: what it shall hold.
        first_wins: leave a file that is already there as it is, instead of replacing it.

    Raises:
        OSError: when it can't be written; the message says what to do when the disk is full.
    """
    if first_wins and path.exists():
        return
    try:
        _publish(path, data, _link if first_wins else os.replace)
    except OSError as error:
        if error.errno in FULL:
            raise OSError(error.errno, _full(path, error, len(data))) from error
        raise


def _publish(path: Path, data: bytes, name: Callable[[Path, Path], None]) -> None:
    part, file = _new_part(path)
    try:
        with file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            if sys.platform == "win32":
                file.close()  # Windows gives no open file another name
            name(part, path)
    finally:
        part.unlink(missing_ok=True)
    _sync(path.parent)


def link_or_copy(source: Path, path: Path) -> None:
    """Give a file a second name, in another folder; a copy on another disk or where the file system has no links."""
    try:
        os.link(source.resolve(), path)
    except OSError as error:
        if error.errno not in (*NO_LINKS, errno.EXDEV):
            raise
        publish(path, source.read_bytes())
    _sync(path.parent)


def remove_leftovers(folder: Path) -> None:
    """Delete what killed writers left half-written; what a living one is writing stays, for it holds a lock."""
    for part in folder.iterdir():
        if PART.fullmatch(part.name):
            _remove_if_abandoned(part)


def _remove_if_abandoned(part: Path) -> None:
    try:
        with part.open("r+b") as file:
            if _locked(file, wait=False):
                part.unlink()
    except (FileNotFoundError, PermissionError):  # its writer has ended meanwhile, or is another user's
        return


def _new_part(path: Path) -> tuple[Path, BinaryIO]:
    """A locked file for the bytes, with the process's number in its name for whoever looks into the folder."""
    while True:
        part = path.with_name(f"{path.name}.part.{os.getpid()}.{secrets.token_hex(4)}")
        file = part.open("xb")
        _locked(file, wait=True)
        if part.exists():  # else it was taken for a leftover before it was locked
            return part, file
        file.close()


def _locked(file: BinaryIO, *, wait: bool) -> bool:
    """Lock a file until it is closed or the process dies; False if another has it or there are no locks."""
    if sys.platform == "win32":
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def _link(part: Path, path: Path) -> None:
    """Give a file its name unless the name is taken."""
    try:
        os.link(part, path)
    except FileExistsError:
        return
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        if not path.exists():  # no hard links here; should two begin at once, their rows still tell whose they are
            os.replace(part, path)


def _sync(folder: Path) -> None:
    if sys.platform == "win32":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC:
            raise
    finally:
        os.close(handle)


def _full(path: Path, error: OSError, size: int) -> str:
    return (
        f"No room to write the {size:,} bytes of {path} ({error.strerror}). What was finished is kept. Free some "
        "space and run freeze again with the same arguments: it goes on where it stopped."
    )
