"""Going on in a folder that has rows already: are they of the pictures that the data set has now?"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from torch import Tensor

from e2kd.frozen.looks import ALLOWED, COMPARED, apart, apart_from, looks_of
from e2kd.frozen.sources import Sample, Source, spread
from e2kd.frozen.writer import Writer

REPLACED = (
    "Sample {row} is not the picture that it was when freezing into {folder} began: it was replaced, or is read "
    "otherwise, and the rows that are there would be kept. Delete the folder, or freeze into another one."
)


def check_resumed(writer: Writer, source: Source, first: Tensor, todo: Iterable[int]) -> None:
    """Raise a ValueError if the data set has other pictures than those of which rows are there; some are looked at.

    Args:
        writer, source: of this pass.
        first: the first canonical image, [C, H, W].
        todo: the shards that this process is to write.
    """
    if not apart_from(first, writer.plan["first_image"]) <= ALLOWED:
        raise ValueError(REPLACED.format(row=0, folder=writer.folder))
    whole = [row for shard in writer.mine() if shard not in todo for row in writer.rows(shard)]
    for place in spread(len(whole), COMPARED):
        sample = source[whole[place]]
        if isinstance(sample, Sample) and not _is_stored(sample, writer):
            raise ValueError(REPLACED.format(row=sample.row, folder=writer.folder))


def _is_stored(sample: Sample, writer: Writer) -> bool:
    """Whether the row that is there is this sample's."""
    stored = writer.stored(sample.row)
    if sample.id != int(stored["ids"][0]):
        return False
    return "looks" not in stored or bool(np.all(apart(looks_of([sample.image]), stored["looks"]) <= ALLOWED))
