"""What was transferred: UniCAM maps of a student and its base, and the features they see, layer by layer.

`unicam` compares two models on one batch; `read` and `compare` are its two halves, for a base that is read only once;
`stability` tells how much of a map is due to the other images of the batch. `layer_features` gives what FSS and RS
(`e2kd.metrics`, `scores_of`) are measured on, of whole images or of the pixels that maps keep; `untrained` makes the
control to compare them with.
"""

from e2kd.transfer.companions import Stability, stability
from e2kd.transfer.contrasting import Transfer, UniCAM, UniCAMResult, compare, unicam
from e2kd.transfer.control import untrained
from e2kd.transfer.localizing import GradCAMRegions, Models, Regions, SameRegions, UniCAMRegions
from e2kd.transfer.readings import LayerReading, Reading, read
from e2kd.transfer.scoring import scores_of
from e2kd.transfer.seeing import LayerFeatures, layer_features
from e2kd.transfer.unique import Objective, energy, relevance, unlikeness

__all__ = [
    "GradCAMRegions",
    "LayerFeatures",
    "LayerReading",
    "Models",
    "Objective",
    "Reading",
    "Regions",
    "SameRegions",
    "Stability",
    "Transfer",
    "UniCAM",
    "UniCAMRegions",
    "UniCAMResult",
    "compare",
    "energy",
    "layer_features",
    "read",
    "relevance",
    "scores_of",
    "stability",
    "unicam",
    "unlikeness",
    "untrained",
]
