"""Going on in a folder that has rows already: are they of the pictures that the data set has now?"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from e2kd.frozen.looks import ALLOWED, apart, looks_of, thumbnail
from e2kd.frozen.sources import Sample, Source, spread
from e2kd.frozen.writer import Writer

LOOKED_AT = 16  # rows, spread over those that are there
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
    if not (thumbnail(first) - torch.tensor(writer.plan["first_image"])).abs().mean() <= ALLOWED:
        raise ValueError(REPLACED.format(row=0, folder=writer.folder))
    whole = [row for shard in writer.mine() if shard not in todo for row in writer.rows(shard)]
    for place in spread(len(whole), LOOKED_AT):
        sample = source[whole[place]]
        if isinstance(sample, Sample) and not _is_stored(sample, writer):
            raise ValueError(REPLACED.format(row=sample.row, folder=writer.folder))


def _is_stored(sample: Sample, writer: Writer) -> bool:
    """Whether the row that is there is this sample's."""
    stored = writer.stored(sample.row)
    if sample.id != int(stored["ids"][0]):
        return False
    return "looks" not in stored or bool(np.all(apart(looks_of([sample.image]), stored["looks"]) <= ALLOWED))
