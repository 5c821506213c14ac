"""JSON files sealed with a checksum of their content and the version of the format."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from e2kd.frozen.errors import CacheError
from e2kd.frozen.fingerprints import canonical, digest
from e2kd.version import __version__

SCHEMA = 1
RESTORE = "Restore the file, or delete it and run freeze again with the same arguments: shards that are whole are kept."


def sealed(content: Mapping[str, Any]) -> bytes:
    """JSON for people, with schema and checksum; equal content gives equal bytes."""
    content = {**content, "schema": SCHEMA}
    return (json.dumps({**content, "checksum": _checksum(content)}, indent=1, sort_keys=True) + "\n").encode()


def unsealed(path: Path) -> dict[str, Any]:
    """The content of a sealed file.

    Raises:
        FileNotFoundError: when there is none.
        CacheError: for a file that is damaged or of a later version.
    """
    try:
        content = json.loads(path.read_bytes().decode("ascii"))
        whole = content.pop("checksum") == _checksum(content)
        schema = content.pop("schema")
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise CacheError(f"{path} is damaged ({type(error).__name__}: {error}). {RESTORE}") from error
    if type(schema) is int and schema > SCHEMA:
        doubt = "" if whole else "; or the file is damaged, for its checksum is wrong"
        raise CacheError(
            f"{path} has version {schema} of the format, but this e2kd, {__version__}, knows it up to {SCHEMA}. "
            f"Upgrade e2kd{doubt}."
        )
    if not whole or schema != SCHEMA:
        raise CacheError(f"{path} is damaged: its content does not have its checksum. {RESTORE}")
    return dict(content)


def _checksum(content: Mapping[str, Any]) -> str:
    return digest(canonical(content).encode())
