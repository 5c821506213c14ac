"""`freeze`: one pass of a teacher over a data set, on one process or many, resumable."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from e2kd.choosing import default_explainer
from e2kd.errors import warn_user
from e2kd.explainers import Explainer
from e2kd.frozen.asking import LARGEST_MAP, Answers, Asked
from e2kd.frozen.encoding import Array
from e2kd.frozen.errors import CacheError
from e2kd.frozen.forecast import check_space
from e2kd.frozen.looks import looks_of
from e2kd.frozen.planning import plan_of
from e2kd.frozen.progress import progress_bar
from e2kd.frozen.records import Record
from e2kd.frozen.resuming import check_resumed
from e2kd.frozen.samples import hashes_of, names_of
from e2kd.frozen.sources import Batch, Sample, Source, Unreadable, batches, check_deterministic, unreadable_message
from e2kd.frozen.teacher import FrozenTeacher
from e2kd.frozen.views import CanonicalView, view_of
from e2kd.frozen.writer import Writer
from e2kd.guards import check_explainers
from e2kd.normalization import Normalization

SMALL = 4096  # values of a map up to which 16 bits are not worth saving
LARGEST_SHARD = 64_000_000  # bytes; freezing takes some six times as much memory


def freeze(
    teacher: nn.Module | str,
    dataset: Any,
    path: str | Path,
    *,
    explainer: Explainer | None = None,
    maps: bool = True,
    classes: str = "teacher",
    view: int | tuple[int, int] | CanonicalView | None = None,
    normalization: Normalization | None = None,
    teacher_size: int | tuple[int, int] | None = None,
    top: int | None = None,
    map_type: str | None = None,
    map_size: int | tuple[int, int] = LARGEST_MAP,
    ids: Sequence[str] | None = None,
    batch_size: int = 64,
    workers: int = 0,
    shard_rows: int | None = None,
    rank: int | None = None,
    world: int | None = None,
    progress: bool = True,
) -> FrozenTeacher | None:
    """Ask a teacher once about every image, and keep its logits and explanations on disk.

    Shards are written whole or not at all: killed at any moment and started again, freeze computes what is missing and
    ends with the same bytes. Under `accelerate launch` or `torchrun` every process takes its share of the shards
    and the last to end completes the cache.

    Args:
        teacher: a module on its device, or a timm name; it is run in eval mode and left as it was.
        dataset: (image, label) or dicts with them, without random transforms: images as PIL images, which become RGB
            whatever their mode, arrays [H, W, C] or tensors [C, H, W], of 1, 3, 4 or 6 channels, uint8, or
            floating-point as the teacher takes them.
        path: the cache's folder.
        explainer: None is `BcosWeights()` for a B-cos network, else `GradCAM()`.
        maps: False stores logits alone, for plain KD.
        classes: the class a map explains: "teacher" (its top class) or "labels"; "all" keeps a map for each class,
            so it is for few classes.
        view: side, (H, W) or `CanonicalView` that images are brought to; None if they are of one size already.
        normalization: (mean, std) the teacher expects of images in [0, 1]; timm models know theirs.
        teacher_size: side or (H, W) the teacher expects; the whole view is resized to it.
        top: store the largest logits alone, and the probability of the rest.
        map_type: "float16", "int8" or "uint8"; None is float16 for small maps, else int8.
        map_size: side or (h, w) to which finer maps are averaged.
        ids: a name for each sample, where the data set has none by which it should be known again.
        batch_size, workers: of the pass.
        shard_rows: rows of a shard, the unit of work that a kill can lose; None is at most 4096 and about 64 MB.
        rank, world: which process of how many this is; found in RANK and WORLD_SIZE if None.
        progress: show a bar with throughput and time left.

    Returns:
        The frozen teacher; None in a process that ended before the others.

    Raises:
        TypeError: for what is no explainer.
        ValueError: for settings that can't be frozen, another cache's folder, samples that could not be read (finished
            shards are kept).
        OSError: when the disk is full; finished shards are kept.

    >>> import tempfile, torch
    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    >>> data = torch.utils.data.TensorDataset(torch.rand(8, 3, 16, 16), torch.arange(8) % 5)
    >>> freeze(net, data, tempfile.mkdtemp(), progress=False)
    FrozenTeacher(Sequential, 8 images, 5 classes, maps [1, 14, 14] float16)
    """
    check_explainers(explainer=explainer)
    path = _folder(path)
    rank, world = _place(rank, world)
    names = list(ids) if ids is not None else names_of(dataset)
    if names is not None and len(names) != len(dataset):
        raise ValueError(f"Expected one id for each of the {len(dataset)} samples, but got {len(names)}.")
    source = Source(dataset, view_of(view), None if names is None else hashes_of(names))
    first = check_deterministic(source)
    size = (map_size, map_size) if isinstance(map_size, int) else map_size
    how = (explainer or default_explainer(teacher)) if maps else None
    asked = Asked(teacher, first.image, how, classes, normalization, teacher_size, size)
    record = _record(asked, first, top, map_type, named=names is not None)
    rows = shard_rows or _shard_rows(len(dataset), record)
    forecast = check_space(record, len(dataset), path, world)
    plan = plan_of(asked, source, first.image, record, rows, batch_size, given=ids is not None)
    writer = Writer(path, plan, record, rank=rank, world=world)
    todo = {shard: writer.rows(shard) for shard in writer.todo()}
    check_resumed(writer, source, first.image, todo)
    with progress_bar(f"freezing {forecast}", sum(map(len, todo.values())), shown=progress) as advance:
        _write(writer, asked, batches(source, todo, batch_size, workers), advance)
    if not writer.finish():
        return None
    frozen = FrozenTeacher.open(path)
    _warn_dead(frozen)
    return frozen


def _folder(path: str | Path) -> Path:
    """Where the cache will be, whatever becomes of the working directory."""
    folder = Path(path).absolute()
    if folder.exists() and not folder.is_dir():
        raise CacheError(f"Expected a folder to write the cache into, but {folder} is a file. Name another one.")
    return folder


def _place(rank: int | None, world: int | None) -> tuple[int, int]:
    world = int(os.environ.get("WORLD_SIZE", 1)) if world is None else world
    rank = int(os.environ.get("RANK", 0)) if rank is None else rank
    if not 0 <= rank < world:
        raise ValueError(f"Expected a rank from 0 to world - 1, but got rank {rank} of {world}.")
    return rank, world


def _record(asked: Asked, first: Sample, top: int | None, map_type: str | None, *, named: bool) -> Record:
    """The layout of the rows, once the first of them has been encoded: what can't be stored is refused before a plan
    is written."""
    answers = asked(first.image[None].expand(2, -1, -1, -1), [first.label] * 2)
    maps = answers.maps
    shape = None if maps is None else (maps.shape[1], maps.shape[2], maps.shape[3])
    if maps is not None and map_type is None:
        map_type = "float16" if maps[0].numel() <= SMALL else "int8"
    classes = answers.logits.shape[1]
    each = classes if maps is not None and asked.classes == "all" else 1
    record = Record(classes, top, shape, map_type or "float16", each, looks=named)  # pixels that are the name say more
    _stored(record, answers, torch.stack([first.image] * 2), np.zeros(2, np.uint64))
    return record


def _shard_rows(count: int, record: Record) -> int:
    """About 64 shards for small data sets, no more than 4096 rows or 64 MB, and whole batches of the usual sizes."""
    return max(64, min(4096, count // 64 // 64 * 64, LARGEST_SHARD // record.row_bytes // 64 * 64))


def _write(writer: Writer, asked: Asked, found: Iterator[Batch], advance: Callable[[int], None]) -> None:
    """Encode batches and write each shard that is complete; what could not be read is raised at the end."""
    unreadable: list[Unreadable] = []
    parts: list[dict[str, Array]] = []
    for batch, last in _with_last(found):
        unreadable += batch.unreadable
        parts.append({} if batch.unreadable else _encoded(writer.record, asked, batch))
        advance(len(batch.labels))
        if last:
            if all(parts):
                writer.write(batch.shard, {name: np.concatenate([p[name] for p in parts]) for name in parts[0]})
            parts = []
    if unreadable:
        raise ValueError(unreadable_message(unreadable, len(writer.done()), writer.shards))


def _with_last(found: Iterator[Batch]) -> Iterator[tuple[Batch, bool]]:
    """Each batch, with whether it is the last of its shard."""
    before: Batch | None = None
    for batch in found:
        if before is not None:
            yield before, before.shard != batch.shard
        before = batch
    if before is not None:
        yield before, True


def _encoded(record: Record, asked: Asked, batch: Batch) -> dict[str, Array]:
    return _stored(record, asked(batch.images, batch.labels), batch.images, batch.ids)


def _stored(record: Record, answers: Answers, images: Tensor, ids: NDArray[np.uint64]) -> dict[str, Array]:
    looks = looks_of(images) if record.looks else None
    return record.encode(answers.logits, answers.maps, answers.classes, ids, looks)


def _warn_dead(frozen: FrozenTeacher) -> None:
    zero, count = frozen.store.zero_maps, frozen.store.record.map_count * len(frozen)
    if zero > 0.5 * count:
        warn_user(
            f"{zero} of {count} cached maps are zero everywhere and teach nothing. Is the teacher trained, and "
            "are the images normalised as it expects? Else name another layer or explainer; for all classes, CAM() has "
            "maps of classes that are not seen."
        )
