"""What was transferred: UniCAM maps of a student and its base, and the features they see, layer by layer.

`unicam` compares two models on one batch; `read` and `compare` are its two halves, for a base that is read only once;
`stability` tells how much of a map is due to the other images of the batch.
"""

from e2kd.transfer.companions import Stability, stability
from e2kd.transfer.contrasting import Transfer, UniCAM, UniCAMResult, compare, unicam
from e2kd.transfer.readings import LayerReading, Reading, read
from e2kd.transfer.unique import Objective, energy, relevance, unlikeness

__all__ = [
    "LayerReading",
    "Objective",
    "Reading",
    "Stability",
    "Transfer",
    "UniCAM",
    "UniCAMResult",
    "compare",
    "energy",
    "read",
    "relevance",
    "stability",
    "unicam",
    "unlikeness",
]
