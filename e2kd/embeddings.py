"""What stands for class names when features are compared with labels: a text encoder's embeddings, or one-hot."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from e2kd.folders import cache_folder

PARTS = ("*.json", "*.txt", "model.safetensors")  # what an encoder is made of; nothing is unpickled
TOKENS = 64  # most tokens of a name
BATCH = 64  # names encoded at a time


def label_embeddings(
    names: Sequence[str],
    encoder: str | Path | None = None,
    *,
    pooled: bool = False,
    cache: str | Path | bool = True,
) -> Tensor:
    """Embeddings of class names [K, d] in float32: rows of a text encoder, or one-hot without any download.

    The paper uses `label_embeddings(names, "bert-base-uncased", pooled=True)`: the pooler's output for each lower-case
    name. With two classes all embeddings are equal to a distance correlation, so there one-hot is enough.

    Args:
        names: of the classes, in the order of the labels.
        encoder: folder or hub id of a BERT-family encoder with safetensors weights; None is one-hot. Remote code is
            not run.
        pooled: the pooler's output as it is; otherwise the mean over the tokens, scaled to unit length, which sentence
            encoders are trained for.
        cache: folder of the embeddings that were computed before; True is $E2KD_CACHE, else e2kd in
            $XDG_CACHE_HOME or ~/.cache; False computes anew. Entries are found by the content of the names and of the
            encoder's files.

    Raises:
        ValueError: for no names, empty ones, or an encoder without a trained pooler if it is asked for.
        OSError: when the encoder is neither on disk nor can be downloaded.

    >>> label_embeddings(["cat", "dog"])
    tensor([[1., 0.],
            [0., 1.]])
    """
    names = list(names)
    if not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise ValueError(f"Expected the names of the classes as a list of words, but got {names!r:.80}.")
    if encoder is None:
        return torch.eye(len(names))
    folder = _folder(str(encoder))
    if cache is False:
        return _encoded(names, folder, pooled)
    home = cache_folder() if cache is True else Path(cache)
    entry = home / f"labels-{_fingerprint(names, folder, pooled)}.safetensors"
    if entry.exists():
        return _loaded(entry, len(names))
    made = _encoded(names, folder, pooled)
    _save(made, entry)
    return made


def _folder(encoder: str) -> Path:
    """The folder of an encoder: itself, or where the hub's copy of it lies."""
    if Path(encoder).is_dir():
        return Path(encoder)
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError as error:
        raise _missing() from error
    try:
        return Path(snapshot_download(encoder, allow_patterns=list(PARTS)))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise OSError(
            f"The text encoder {encoder!r} is neither a folder nor in the hub's cache, and could not be downloaded: "
            f"{error}. Give the folder of an encoder (from_pretrained's), or leave encoder= out for one-hot labels."
        ) from error


def _missing() -> ImportError:
    return ImportError('Text encoders are run by transformers: pip install "e2kd[transformers]".')


def _fingerprint(names: list[str], folder: Path, pooled: bool) -> str:
    """Hash of everything the embeddings depend on: the names and the bytes of the encoder's files."""
    found = hashlib.blake2b(json.dumps([names, pooled]).encode(), digest_size=16)
    for path in sorted({path for pattern in PARTS for path in folder.glob(pattern)}):
        found.update(path.name.encode() + b"\0" + str(path.stat().st_size).encode() + b"\0")
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                found.update(block)
    return found.hexdigest()


def _save(embeddings: Tensor, entry: Path) -> None:
    """Written whole or not at all, whichever process comes first."""
    from safetensors.torch import save_file

    entry.parent.mkdir(parents=True, exist_ok=True)
    partial = entry.with_name(f"{entry.name}.{os.getpid()}.part")
    save_file({"embeddings": embeddings}, partial)
    partial.replace(entry)


def _loaded(entry: Path, count: int) -> Tensor:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(entry)["embeddings"]
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"The cached embeddings {entry} are damaged ({error}). Delete the file.") from error
    if found.ndim != 2 or len(found) != count:
        raise ValueError(f"The cached embeddings {entry} are not of {count} names. Delete the file.")
    return found


def _encoded(names: list[str], folder: Path, pooled: bool) -> Tensor:
    """The embeddings [K, d] that the encoder in a folder gives."""
    model, tokenizer = _encoder(folder, pooled)
    rows = []
    with torch.inference_mode():
        for start in range(0, len(names), BATCH):
            some = names[start : start + BATCH]
            tokens = tokenizer(some, padding=True, truncation=True, max_length=TOKENS, return_tensors="pt")
            rows.append(_rows(model(**tokens), tokens["attention_mask"], pooled))
    return torch.cat(rows).float().clone()


def _rows(outputs: Any, mask: Tensor, pooled: bool) -> Tensor:
    if pooled:
        found: Tensor = outputs.pooler_output
        return found
    weights = mask[..., None].to(outputs.last_hidden_state.dtype)
    return F.normalize((outputs.last_hidden_state * weights).sum(1) / weights.sum(1), dim=1)


def _encoder(folder: Path, pooled: bool) -> tuple[Any, Any]:
    """The model and tokenizer of a folder, with every weight that is needed from its file."""
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        raise _missing() from error
    if not (folder / "model.safetensors").exists():
        raise OSError(
            f"The text encoder in {folder} has no model.safetensors. Other weights would have to be unpickled: convert "
            "them by from_pretrained and save_pretrained."
        )
    model, info = AutoModel.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    missing = [name for name in info["missing_keys"] if pooled or not name.startswith("pooler.")]
    if missing:
        raise ValueError(
            f"The text encoder in {folder} has no trained weights for {', '.join(sorted(missing)[:3])}, which "
            f"would be random. {'Use pooled=False.' if pooled else 'Use another encoder.'}"
        )
    return model.float().eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)
