"""e2kd: explanation-enhanced knowledge distillation for PyTorch.

`criterion = e2kd.E2KDLoss(student, teacher, criterion)` in an existing trainer is all it takes.
"""

from e2kd.dryrun import check
from e2kd.errors import NoEffectWarning, UnsupportedModel
from e2kd.explainers import Explainer, GradCAM, HiResCAM, InputGradient, LayerCAM
from e2kd.inspection import Explanation, explain
from e2kd.logits import KDLoss, MultiLabelKDLoss, kd_loss, multilabel_kd_loss
from e2kd.losses import E2KDLoss, ExplanationLoss
from e2kd.similarity import cosine
from e2kd.version import __version__

__all__ = [
    "E2KDLoss",
    "Explainer",
    "Explanation",
    "ExplanationLoss",
    "GradCAM",
    "HiResCAM",
    "InputGradient",
    "KDLoss",
    "LayerCAM",
    "MultiLabelKDLoss",
    "NoEffectWarning",
    "UnsupportedModel",
    "__version__",
    "check",
    "cosine",
    "explain",
    "kd_loss",
    "multilabel_kd_loss",
]
