"""CRD: student and teacher agree on which image it is, among many others (Tian et al. 2020)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from e2kd.baselines.base import Baseline
from e2kd.baselines.memory import ContrastMemory
from e2kd.baselines.pairs import Batch, Pair
from e2kd.errors import check_temperature
from e2kd.stages import Stage
from e2kd.taught import Indexed

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from e2kd.baselines.base import Settings

EPSILON = 1e-7
NO_INDICES = (
    "CRD compares each sample with a memory of all others, so it has to be told which samples of the data set these "
    "are: wrap the data set, DataLoader(e2kd.baselines.IndexedDataset(dataset), ...). The targets are then "
    "(labels, indices, counts), and your criterion is given the labels alone. What came was {came}."
)


def nce_loss(scores: Tensor, count: int) -> Tensor:
    """Noise-contrastive estimation (Tian et al. 2020, Eq. 10 and 18): is it the sample itself, or one drawn from noise?

    Args:
        scores: normalised exp(similarity / τ) of the sample itself and of N drawn ones, [B, 1 + N].
        count: samples of the data set, M; noise has the density 1 / M.

    Returns:
        -log h of the first - sum log(1 - h) of the others, h = score / (score + N / M), averaged over the batch, [].

    >>> nce_loss(torch.tensor([[0.5, 0.5, 0.5]]), count=4)
    tensor(2.0794)
    """
    noise = (scores.shape[1] - 1) / count
    own, others = scores[:, 0], scores[:, 1:]
    real = (own / (own + noise + EPSILON)).log()
    drawn = (noise / (others + noise + EPSILON)).log().sum(1)
    return -(real + drawn).mean()


class CRD(Baseline):
    """Contrastive representation distillation (Tian et al. 2020), with a memory of the whole data set.

    term = `nce_loss`(student against the teacher's memory) + `nce_loss`(teacher against the student's memory), of
    linear embeddings, of unit length, of what enters both classifiers. The targets must carry the samples' indices:

        loader = DataLoader(IndexedDataset(dataset), ...)  # (image, Indexed) for (image, label)

    The memory is made with the first batch, for as many samples as the data set has, and is part of
    `state_dict`. Each process has its own, which it renews with the samples that it sees. Cost per step: B x M products
    of `width` numbers.

    Args:
        student, teacher, criterion: see `Baseline`.
        weight: β; the paper's 0.8.
        negatives: N, drawn anew for each sample, with repetition: of other classes as far as labels are class
            indices and the memory has seen them, else of other samples.
        temperature: τ.
        momentum: of the memory, the share of the old embedding in a renewed one, in [0, 1).
        width: of the embeddings.
        settings: see `Baseline`.

    Raises:
        ValueError: for settings outside their range; in the first step, when the targets carry no indices.

    >>> from e2kd.baselines import IndexedDataset
    >>> net = lambda width: nn.Sequential(
    ...     nn.Conv2d(3, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5))
    >>> student, teacher = net(4), net(8)
    >>> data = IndexedDataset([(torch.rand(3, 32, 32), n % 5) for n in range(20)])
    >>> images, targets = next(iter(torch.utils.data.DataLoader(data, batch_size=4)))
    >>> criterion = CRD(student, teacher, nn.CrossEntropyLoss())
    >>> criterion(student(images), targets).backward()
    >>> criterion.memory.student.shape
    torch.Size([20, 128])
    """

    name = "crd"
    shows = ("negatives", "temperature", "momentum", "width")

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | str,
        criterion: Callable[..., Tensor] | None = None,
        *,
        weight: float = 0.8,
        negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
        width: int = 128,
        **settings: Unpack[Settings],
    ) -> None:
        def choose(pair: Pair) -> tuple[list[Stage], list[Stage]]:
            return [pair.student.embedding()], [pair.teacher.embedding()]

        check_temperature(temperature)
        if not 0 <= momentum < 1:
            raise ValueError(f"Expected momentum in [0, 1), but got {momentum}. 0 keeps the last embeddings alone.")
        if negatives < 1 or width < 1:
            raise ValueError(f"Expected negatives >= 1 and width >= 1, but got {negatives} and {width}.")
        super().__init__(student, teacher, criterion, weight, choose, **settings)
        self.negatives, self.temperature, self.momentum, self.width = negatives, temperature, momentum, width
        self.student_embedding = self.beside_student(nn.Linear(self.student_stages[0].channels, width))
        self.teacher_embedding = self.beside_student(nn.Linear(self.teacher_stages[0].channels, width))
        self.memory = self.beside_student(ContrastMemory(width, momentum))

    def term(self, batch: Batch) -> Tensor:
        """Pooled features of both networks -> []; renews the memory."""
        targets = batch.targets
        if not isinstance(targets, Indexed):
            raise ValueError(NO_INDICES.format(came=_say(targets)))
        device = batch.student_logits.device
        indices, labels = targets.indices.to(device), _class_indices(targets.labels, indices=targets.indices)
        self.memory.fit(targets.counts)
        mine = F.normalize(self.student_embedding(batch.student[0].mean((2, 3))))
        theirs = F.normalize(self.teacher_embedding(batch.teacher[0].mean((2, 3))))
        drawn = self.memory.draw(indices, None if labels is None else labels.to(device), self.negatives)
        columns = torch.cat([indices[:, None], drawn], 1)
        count = len(self.memory.student)
        scores = self.memory.scores(mine, theirs, columns, self.temperature)
        loss = sum((nce_loss(score, count) for score in scores), mine.new_zeros(()))
        self.memory.renew(indices, mine, theirs)
        return loss


def _class_indices(labels: Any, indices: Tensor) -> Tensor | None:
    good = isinstance(labels, Tensor) and labels.shape == indices.shape and not labels.is_floating_point()
    return labels.long() if good else None


def _say(targets: Any) -> str:
    return "nothing" if targets is None else f"a {type(targets).__name__}"
