"""Knowledge distillation on logits: the softmax form and the multi-label form."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from e2kd.errors import check_reduction, check_temperature, shape
from e2kd.showing import shown
from e2kd.similarity import at_least_float32

ONE_LOGIT = (
    "Expected logits of two classes or more, [B, K], but got {shape}: the softmax of one is always 1, so nothing could "
    "be learned from it. For one logit of a yes or no pass distillation=MultiLabelKDLoss() to E2KDLoss."
)


def check_softmax(logits: Tensor) -> None:
    """Raise a ValueError for logits [B, 1], whose softmax says nothing."""
    if logits.shape[-1] < 2:
        raise ValueError(ONE_LOGIT.format(shape=shape(logits.shape)))


def _checked(student: Tensor, teacher: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    if student.ndim != 2 or student.shape != teacher.shape:
        raise ValueError(
            f"Expected logits [B, K] of equal shape, but the student's are {shape(student.shape)} and the "
            f"teacher's {shape(teacher.shape)}. Teacher and student must be trained for the same classes."
        )
    check_reduction(reduction)
    return at_least_float32(student), at_least_float32(teacher)


def _reduced(values: Tensor, reduction: str) -> Tensor:
    return values.mean() if reduction == "mean" else values


def kd_loss(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, *, reduction: str = "mean"
) -> Tensor:
    """Distillation loss of Hinton et al., τ² KL(softmax(t/τ) || softmax(s/τ)), in nats, >= 0.

    Summed over classes, averaged over the batch ("batchmean"), computed in log space in at least float32.
    This is the KL divergence, as in the papers' code; Eq. 1 of the e²KD paper writes the cross-entropy,
    which differs by the teacher's entropy: another value, the same gradient.

    Args:
        student_logits: [B, K].
        teacher_logits: [B, K]; gradients flow to it if it has any, `E2KDLoss` detaches it.
        temperature: τ > 0.
        reduction: "mean" -> [], "none" -> [B].

    Raises:
        ValueError: for logits of different shapes or of one class, τ <= 0 or an unknown reduction.

    >>> import torch
    >>> kd_loss(torch.tensor([[1., 2.]]), torch.tensor([[1., 2.]]))
    tensor(0.)
    >>> kd_loss(torch.zeros(3, 2), torch.tensor([[0., 1.]] * 3), temperature=2.0, reduction="none").shape
    torch.Size([3])
    """
    check_temperature(temperature)
    student, teacher = _checked(student_logits, teacher_logits, reduction)
    check_softmax(student)
    log_s, log_t = (F.log_softmax(z / temperature, dim=1) for z in (student, teacher))
    return _reduced(F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(1) * temperature**2, reduction)


def multilabel_kd_loss(student_logits: Tensor, teacher_logits: Tensor, *, reduction: str = "mean") -> Tensor:
    """Multi-label distillation: KL(p_t || p_s) + KL(1-p_t || 1-p_s) with p = sigmoid(z), in nats, >= 0.

    Summed over classes, averaged over the batch: the e²KD paper's setting for VOC. Computed with
    log-sigmoid, so no clamp is needed; the papers' code clamps p to [1e-6, 1-1e-6].

    Args:
        student_logits: [B, K].
        teacher_logits: [B, K].
        reduction: "mean" -> [], "none" -> [B].

    Raises:
        ValueError: for logits of different shapes or an unknown reduction.

    >>> import torch
    >>> multilabel_kd_loss(torch.zeros(2, 5), torch.zeros(2, 5))
    tensor(0.)
    """
    student, teacher = _checked(student_logits, teacher_logits, reduction)
    positive, negative = (
        F.kl_div(F.logsigmoid(sign * student), F.logsigmoid(sign * teacher), reduction="none", log_target=True)
        for sign in (1, -1)
    )
    return _reduced((positive + negative).sum(1), reduction)


class KDLoss(nn.Module):
    """`kd_loss` as a module.

    Raises:
        ValueError: for τ <= 0 or an unknown reduction.

    >>> import torch
    >>> KDLoss(temperature=2.0)(torch.zeros(2, 3), torch.zeros(2, 3))
    tensor(0.)
    """

    def __init__(self, temperature: float = 1.0, *, reduction: str = "mean") -> None:
        super().__init__()
        check_temperature(temperature)
        check_reduction(reduction)
        self.temperature, self.reduction = temperature, reduction

    def extra_repr(self) -> str:
        """The settings."""
        return shown(temperature=self.temperature, reduction=self.reduction)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """Student and teacher logits [B, K] -> [] or [B]."""
        return kd_loss(student_logits, teacher_logits, self.temperature, reduction=self.reduction)


class MultiLabelKDLoss(nn.Module):
    """`multilabel_kd_loss` as a module.

    Raises:
        ValueError: for an unknown reduction.

    >>> import torch
    >>> MultiLabelKDLoss()(torch.zeros(2, 3), torch.zeros(2, 3))
    tensor(0.)
    """

    def __init__(self, *, reduction: str = "mean") -> None:
        super().__init__()
        check_reduction(reduction)
        self.reduction = reduction

    def extra_repr(self) -> str:
        """The setting."""
        return shown(reduction=self.reduction)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """Student and teacher logits [B, K] -> [] or [B]."""
        return multilabel_kd_loss(student_logits, teacher_logits, reduction=self.reduction)
