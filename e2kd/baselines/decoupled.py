"""DKD: the label's probability and the other classes' order, weighted apart (Zhao et al. 2022)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from e2kd.baselines.base import Baseline
from e2kd.baselines.pairs import Batch
from e2kd.errors import check_temperature, check_weight, shape
from e2kd.lessons import Prepared
from e2kd.logits import check_softmax
from e2kd.similarity import at_least_float32
from e2kd.tasks import IGNORED

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from e2kd.baselines.base import Settings


def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
) -> Tensor:
    """Decoupled distillation (Zhao et al. 2022, Eq. 7): α TCKD + β NCKD, times τ², averaged over the batch.

    TCKD is the KL divergence of (p, 1 - p) with p the label's probability, NCKD that of the other classes' softmax.
    KD is α = 1 and β = 1 - p of the teacher, for each sample.

    Args:
        student_logits, teacher_logits: [B, K], K >= 2.
        labels: class indices [B]; samples of -100, which counts for nothing in torch's losses, are left out.
        alpha, beta, temperature: α, β and τ.

    Returns:
        [], >= 0.

    Raises:
        ValueError: for labels that are no class indices, or on the CPU outside of [0, K - 1]; one class; α or β below
            0, or τ <= 0.

    >>> logits = torch.tensor([[1., 2., 0.]])
    >>> dkd_loss(logits, logits, torch.tensor([1]))
    tensor(0.)
    """
    _check_settings(alpha, beta, temperature)
    if not isinstance(labels, Tensor) or labels.shape != student_logits.shape[:1] or labels.is_floating_point():
        came = f"{shape(labels.shape)} of {labels.dtype}" if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(
            f"DKD weighs the label's class apart from the others and needs class indices [{len(student_logits)}], but "
            f"got {came}. For mixed or soft labels there is KD: E2KDLoss(student, teacher, criterion, weight=0)."
        )
    check_softmax(student_logits)
    known = labels != IGNORED
    if labels.device.type == "cpu" and len(named := labels[known]):
        _check_range(named, student_logits.shape[1])
    log_s, log_t = ((at_least_float32(z) / temperature).log_softmax(1) for z in (student_logits, teacher_logits))
    labels = labels.long().where(known, 0)
    target = _kl(*(_binary(log_p, labels) for log_p in (log_s, log_t)))
    others = _kl(*(_others(log_p, labels).log_softmax(1) for log_p in (log_s, log_t)))
    each = torch.where(known, alpha * target + beta * others, 0.0)
    return each.sum() / known.sum().clamp(min=1) * temperature**2


def _check_range(labels: Tensor, classes: int) -> None:
    if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(
            f"Expected labels from 0 to {classes - 1}, or {IGNORED} for none, but some are {int(labels.min())} or "
            f"{int(labels.max())}."
        )


def _check_settings(alpha: float, beta: float, temperature: float) -> None:
    check_weight("alpha", alpha)
    check_weight("beta", beta)
    check_temperature(temperature)


def _kl(log_s: Tensor, log_t: Tensor) -> Tensor:
    return F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(1)


def _others(values: Tensor, labels: Tensor) -> Tensor:
    """[B, K] without the label's column."""
    columns = torch.arange(values.shape[1] - 1, device=values.device).expand(len(values), -1)
    return values.gather(1, columns + (columns >= labels[:, None]))


def _binary(log_p: Tensor, labels: Tensor) -> Tensor:
    """(log p, log(1 - p)) of the label's class, [B, 2]."""
    return torch.cat([log_p.gather(1, labels[:, None]), _others(log_p, labels).logsumexp(1, keepdim=True)], 1)


class DKD(Baseline):
    """Decoupled knowledge distillation (Zhao et al. 2022): `dkd_loss` of the logits. A frozen teacher will do.

    Args:
        student, criterion: see `Baseline`.
        teacher: a module, a timm name or a `FrozenTeacher`.
        weight: of both terms.
        alpha, beta, temperature: the authors' for CIFAR-100, with `warmup` of 20 epochs; they search β by the teacher
            and use α = 1, β = 0.5, τ = 1 for ImageNet.
        settings: see `Baseline`.

    >>> net = lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 5))
    >>> student, teacher = net(), net()
    >>> criterion = DKD(student, teacher, nn.CrossEntropyLoss())
    >>> criterion(student(torch.rand(2, 3, 32, 32)), torch.tensor([0, 3])).backward()
    """

    name = "dkd"
    shows = ("alpha", "beta", "temperature")
    takes_features = False

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | str | Prepared,
        criterion: Callable[..., Tensor] | None = None,
        *,
        weight: float = 1.0,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
        **settings: Unpack[Settings],
    ) -> None:
        _check_settings(alpha, beta, temperature)
        super().__init__(student, teacher, criterion, weight, **settings)
        self.alpha, self.beta, self.temperature = alpha, beta, temperature

    def term(self, batch: Batch) -> Tensor:
        """Logits and labels -> []."""
        settings = (self.alpha, self.beta, self.temperature)
        return dkd_loss(batch.student_logits, batch.teacher_logits, batch.labels, *settings)
