"""e2kd: explanation-enhanced knowledge distillation for PyTorch.

`criterion = e2kd.E2KDLoss(student, teacher, criterion)` in an existing trainer is all it takes.
"""

from typing import TYPE_CHECKING, Any

from e2kd.dryrun import check
from e2kd.errors import NoEffectWarning, UnsupportedModel
from e2kd.explainers import CAM, BcosContributions, BcosWeights, Explainer, GradCAM, HiResCAM, InputGradient, LayerCAM
from e2kd.inspection import Explanation, explain
from e2kd.logits import KDLoss, MultiLabelKDLoss, kd_loss, multilabel_kd_loss
from e2kd.losses import E2KDLoss, ExplanationLoss
from e2kd.similarity import cosine
from e2kd.taught import Taught
from e2kd.version import __version__

if TYPE_CHECKING:
    from e2kd import baselines, bcos, distance, frozen, guidance, metrics, monitor, perturb, trainers, transfer
    from e2kd.augment import JointAugmentation
    from e2kd.embeddings import label_embeddings
    from e2kd.frozen import CanonicalView, FrozenDataset, FrozenTeacher, freeze
    from e2kd.monitor import TransferMonitor
    from e2kd.transfer import UniCAMResult, unicam

__all__ = [
    "CAM",
    "BcosContributions",
    "BcosWeights",
    "CanonicalView",
    "E2KDLoss",
    "Explainer",
    "Explanation",
    "ExplanationLoss",
    "FrozenDataset",
    "FrozenTeacher",
    "GradCAM",
    "HiResCAM",
    "InputGradient",
    "JointAugmentation",
    "KDLoss",
    "LayerCAM",
    "MultiLabelKDLoss",
    "NoEffectWarning",
    "Taught",
    "TransferMonitor",
    "UniCAMResult",
    "UnsupportedModel",
    "__version__",
    "baselines",
    "bcos",
    "check",
    "cosine",
    "distance",
    "explain",
    "freeze",
    "frozen",
    "guidance",
    "kd_loss",
    "label_embeddings",
    "metrics",
    "monitor",
    "multilabel_kd_loss",
    "perturb",
    "trainers",
    "transfer",
    "unicam",
]

# loaded when asked for
_PARTS = (
    "baselines", "bcos", "distance", "frozen", "guidance", "metrics", "monitor", "perturb", "trainers", "transfer",
)  # fmt: skip
_LATER = {  # names that do, from the module named
    "CanonicalView": "frozen",
    "FrozenDataset": "frozen",
    "FrozenTeacher": "frozen",
    "JointAugmentation": "augment",
    "TransferMonitor": "monitor",
    "UniCAMResult": "transfer",
    "freeze": "frozen",
    "label_embeddings": "embeddings",
    "unicam": "transfer",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _PARTS:
        return import_module(f"e2kd.{name}")
    if name not in _LATER:
        raise AttributeError(f"module 'e2kd' has no attribute {name!r}")
    return getattr(import_module(f"e2kd.{_LATER[name]}"), name)


def __dir__() -> list[str]:
    return __all__
