"""Other distillation methods in e²KD's one-line form, to compare with and to put e²KD on top of.

    criterion = e2kd.baselines.CRD(student, teacher, criterion)                               # CRD
    criterion = e2kd.E2KDLoss(student, teacher, e2kd.baselines.CRD(student, teacher, criterion))  # CRD + KD + e²KD

All are built as `METHODS[name](student, teacher, criterion, weight=weight)` and called as the criterion was. Parts that
a method trains are `criterion.parameters()`; see `Baseline`.
"""

from collections.abc import Callable

from e2kd.baselines.attention import AT, attention
from e2kd.baselines.base import Baseline
from e2kd.baselines.class_attention import CATKD, class_activation_maps
from e2kd.baselines.contrast import CRD, nce_loss
from e2kd.baselines.decoupled import DKD, dkd_loss
from e2kd.baselines.hints import FitNets
from e2kd.baselines.matching import AFD
from e2kd.baselines.memory import IndexedDataset
from e2kd.baselines.overhaul import Overhaul, partial_distance
from e2kd.baselines.pairs import Batch
from e2kd.baselines.review import ReviewKD, hierarchical_context_loss
from e2kd.taught import Indexed

METHODS: dict[str, Callable[..., Baseline]] = {
    method.__name__: method for method in (AT, FitNets, ReviewKD, CRD, Overhaul, AFD, CATKD, DKD)
}

__all__ = [
    "AFD",
    "AT",
    "CATKD",
    "CRD",
    "DKD",
    "METHODS",
    "Baseline",
    "Batch",
    "FitNets",
    "Indexed",
    "IndexedDataset",
    "Overhaul",
    "ReviewKD",
    "attention",
    "class_activation_maps",
    "dkd_loss",
    "hierarchical_context_loss",
    "nce_loss",
    "partial_distance",
]
