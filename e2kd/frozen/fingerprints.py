"""Hashes that tell whether two teachers, data sets, settings or files are the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from e2kd.errors import shape


def digest(data: Any) -> str:
    """BLAKE2b of bytes, or of anything with a buffer, in 32 hexadecimal digits.

    >>> digest(b"")
    'cae66941d9efbd404e4d88758ea67670'
    """
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def canonical(value: Any) -> str:
    """JSON in one form: sorted keys, ASCII, no spaces. Tuples are lists, whatever was a key is a string.

    Raises:
        TypeError, ValueError: for what JSON can't hold, NaN included.

    >>> canonical({"b": (1, 2), 10: None, 9: 0.5})
    '{"10":null,"9":0.5,"b":[1,2]}'
    """
    plain = json.loads(json.dumps(value, allow_nan=False))  # number keys sort as the strings they become
    return json.dumps(plain, sort_keys=True, separators=(",", ":"))


def hash_json(value: Any) -> str:
    """Hash of settings: equal for equal content, whatever the order of keys.

    >>> hash_json({"a": 1, "b": (2, 3)}) == hash_json({"b": [2, 3], "a": 1})
    True
    """
    return digest(canonical(value).encode())


def hash_weights(module: nn.Module) -> str:
    """Hash of a module's state: name, type, shape and bytes of every tensor of `state_dict()`, in its order.

    The same on every device and for every precision. A wrapper (DistributedDataParallel, `torch.compile`) renames
    the tensors and so has another hash: give the module inside.

    Raises:
        TypeError: for a state that is no tensor (`get_extra_state`), which has no bytes to compare.

    >>> hash_weights(nn.Linear(2, 2)) == hash_weights(nn.Linear(2, 2))
    False
    """
    state = hashlib.blake2b(digest_size=16)
    for name, value in module.state_dict().items():
        if not isinstance(value, Tensor):
            raise TypeError(f"Expected tensors alone in the state_dict, but {name!r} is a {type(value).__name__}.")
        state.update(canonical([name, str(value.dtype), list(value.shape)]).encode())
        state.update(_bytes(value).data)
    return state.hexdigest()


def _bytes(value: Tensor) -> NDArray[np.uint8]:
    plain: NDArray[np.uint8] = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return plain


def id_hash(sample_id: str) -> int:
    """A sample's id, such as its relative path, as an unsigned 64-bit number.

    >>> id_hash("n01440764/n01440764_10026.JPEG")
    3201564428367291821
    """
    # File names that are no valid text reach Python with surrogates in them.
    data = sample_id.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def hash_ids(ids: Iterable[str] | NDArray[np.uint64]) -> str:
    """Hash of all sample ids in their order; of the ids themselves, or of their `id_hash` as uint64 [N].

    >>> hash_ids(["a", "b"]) == hash_ids(np.array([id_hash("a"), id_hash("b")], dtype=np.uint64))
    True
    >>> hash_ids(["a", "b"]) == hash_ids(["b", "a"])
    False
    """
    if not isinstance(ids, np.ndarray):
        ids = np.fromiter((id_hash(sample_id) for sample_id in ids), dtype=np.uint64)
    if ids.dtype != np.uint64 or ids.ndim != 1:
        raise TypeError(f"Expected sample ids as strings or uint64 [N], but got {ids.dtype} {shape(ids.shape)}.")
    return digest(np.ascontiguousarray(ids, dtype="<u8"))
