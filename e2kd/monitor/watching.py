"""`TransferMonitor`: what a student learned beyond its base, what it left behind, and where it looks, every N steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from e2kd.errors import shape, warn_user
from e2kd.explainers import Explainer
from e2kd.guards import check_explainers
from e2kd.modes import device_of, undrawn, unwrap
from e2kd.monitor import ranks
from e2kd.monitor.budget import Budget
from e2kd.monitor.probed import Part, Probed
from e2kd.monitor.sinks import Log, LogImages
from e2kd.sharding import reshard
from e2kd.transfer import Regions, untrained
from e2kd.transfer.contrasting import label_rows, names_of

Probe = Tensor | Sequence[Tensor]
PROBE = (
    "Expected the probe as images [n, C, H, W], one at least, or as (images, labels), both tensors, but got {}. Of a "
    "batch in a dict pass its two tensors: (batch['image'], batch['label'])."
)


class TransferMonitor:
    """Shows, every so many training steps, what was transferred to a student; one line in the loop.

    A fixed batch of images is given to the student, and to the fixed models it is compared with. What is logged:

    - `agreement` on the top class, `explanation_cosine` and `zero_maps` (share of maps without evidence) between the
      student and the teacher, or the base if there is no teacher, explained for that one's top class; with masks
      `epg_student` and `epg_reference`, the share of the maps' energy on the object;
    - for each layer `fss`, `rs_student`, `rs_base`, `rs_distilled` and `rs_residual` of whole images, with labels those
      of relevance; the same under `regions/` of the pixels that each model's map keeps, if regions were asked for;
      `fss_control`, the student's similarity to an untrained network, if a control was;
      `blank_distilled` and `blank_residual`, shares of blank maps;
    - `n`, `chance` (the spread of a score of independent features), `seconds` and `share`, what it costs;
    - pictures: rows of images, the student's and the reference's explanation; and for each layer rows of images, what
      the student sees beyond the base, and the base beyond the student.

    Base and teacher are asked once, and again only after their weights have changed. The student's mode, gradients,
    buffers and the random state stay as they were. On several processes the first
    measures and logs, the others go on; where the student is sharded among them all take part and agree on when.

    Args:
        student: the model in training; wrapped by DDP or torch.compile or not.
        base: what it is compared with: the same architecture trained without distillation, or the teacher.
        probe: images [n, C, H, W], or (images, labels [n]), such as a loader's batch; 64 or more, the same throughout.
        log: called as log(scalars, step).
        log_images: called as log_images(pictures, step), with pictures [3, H, W] uint8; None draws none.
        teacher: what answers and explanations are compared with, if that is not the base.
        layers: names in both, or pairs (student's, base's); None is the layer an explanation reads in each.
        embeddings: of the classes, [K, d]; None is one-hot.
        masks: of the objects, [n, H, W].
        base_images, teacher_images: the same pictures as these models expect them, if that differs.
        regions: such as `e2kd.transfer.UniCAMRegions()`: adds scores of perturbed images. On a CPU the imputation
            costs more than all forwards together.
        control: compare the student with an untrained network as well.
        explainer: of the answers; None is chosen for each model, as by `E2KDLoss`.
        every: steps between probes, which come at its multiples, after one at the first call.
        max_seconds: budget of one probe. Explanations come first, then UniCAM, then regions; a stage that would begin
            later than that is skipped, with a warning.
        max_share: of the training time that probes may take; they come later where `every` would exceed it. None lets
            `every` alone decide.
        pictures: images shown in a picture.
        normalization: (mean, std) of the probe's images, to show them in their own colours.
        batch_size: images per forward; None is all.
        prefix: of every name that is logged. The parts of a criterion are `e2kd/agreement` and so on: of training
            batches, where the monitor's are of its probe.

    Attributes:
        latest: every scalar of the last probe, NaN where it has none but an earlier one had, for summaries that need
            the same columns every time: timm's `update_summary(epoch, metrics | monitor.latest, ...)`.
        reasons: why scalars of the last probe are NaN; each is warned of once.

    Raises:
        ValueError: when the probe is no images and labels, masks are none [n, H, W], or there are not as many of all;
            for a layer of the student that is named twice.
        TypeError: for the name of one layer in the place of a list, and for what is no explainer.

    >>> make = lambda: nn.Sequential(
    ...     nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    >>> probe = torch.rand(16, 3, 8, 8), torch.arange(16) % 3
    >>> seen = {}
    >>> monitor = TransferMonitor(make(), make(), probe, lambda scalars, step: seen.update(scalars), every=100)
    >>> for step in range(3):
    ...     monitor(step)  # after the optimizer's step
    >>> sorted(name for name in seen if "rs_" in name)  # doctest: +NORMALIZE_WHITESPACE
    ['e2kd/probe/rs_base/1', 'e2kd/probe/rs_distilled/1', 'e2kd/probe/rs_residual/1', 'e2kd/probe/rs_student/1']
    """

    def __init__(
        self,
        student: nn.Module,
        base: nn.Module,
        probe: Probe,
        log: Log,
        log_images: LogImages | None = None,
        *,
        teacher: nn.Module | None = None,
        layers: Sequence[str | tuple[str, str]] | None = None,
        embeddings: Tensor | None = None,
        masks: Tensor | None = None,
        base_images: Tensor | None = None,
        teacher_images: Tensor | None = None,
        regions: Regions | None = None,
        control: bool = False,
        explainer: Explainer | None = None,
        every: int = 500,
        max_seconds: float | None = 60.0,
        max_share: float | None = 0.02,
        pictures: int = 8,
        normalization: tuple[Sequence[float], Sequence[float]] | None = None,
        batch_size: int | None = None,
        prefix: str = "e2kd/probe/",
    ) -> None:
        images, labels = _images_and_labels(probe)
        check_explainers(explainer=explainer)
        _check_masks(masks)
        names_of(layers)  # now, and not at the first probe
        _check(len(images), base_images=base_images, teacher_images=teacher_images, masks=masks)
        self.student, self.base = unwrap(student), unwrap(base)
        self._models = [self.student, self.base, *([] if teacher is None else [unwrap(teacher)])]
        self.log, self.log_images, self.prefix = log, log_images, prefix
        self.budget = Budget(every, max_seconds, max_share)
        self.latest: dict[str, float] = {}
        self.reasons: dict[str, str] = {}
        self._warned: set[str] = set()
        self._probed = Probed(
            student=self.student,
            base=self.base,
            teacher=None if teacher is None else self._models[2],
            images=images,
            base_images=images if base_images is None else base_images,
            teacher_images=images if teacher_images is None else teacher_images,
            targets=label_rows(labels, embeddings, len(images)),
            masks=masks,
            layers=layers,
            regions=regions,
            control=untrained(self.student) if control else None,
            explainer=explainer,
            pictures=0 if log_images is None else pictures,
            normalization=normalization,
            batch_size=batch_size,
        )

    def __call__(self, step: int) -> None:
        """Probe if it is time to. Call it at every step, in every process.

        Args:
            step: of the whole training, not of an epoch: one that is smaller than before begins a new training.
        """
        together = ranks.takes_all(*self._models)
        if not together and not ranks.is_main():
            return
        if self.budget.steps_passed(step) and self._agreed(self.budget.affordable(), together):
            self.measure(step, together=together)

    def measure(self, step: int, *, together: bool = False) -> dict[str, float]:
        """Probe now and log; returns the scalars, NaN included.

        Args:
            step: of training.
            together: several processes do this at once, because the student is sharded among them.
        """
        device = device_of(self.student, self._probed.images.device)
        self.budget.begin(step)
        try:
            with undrawn(device):
                found = self._measured(device, together)
        finally:
            self._probed.readings = None  # room for the training
            if together:
                for model in self._models:
                    reshard(model)
            self.budget.end()
        scalars = found.scalars | {"seconds": self.budget.last, "share": self.budget.share}
        missing = dict.fromkeys(self.latest, float("nan"))  # what this probe had no time for
        self.latest = missing | {self.prefix + name: value for name, value in scalars.items()}
        self.reasons = found.reasons
        if ranks.is_main():
            self._warn()
            self.log({name: value for name, value in self.latest.items() if value == value}, step)
            if self.log_images is not None and found.pictures:
                self.log_images({self.prefix + name: picture for name, picture in found.pictures.items()}, step)
        return self.latest

    def _measured(self, device: torch.device, together: bool) -> Part:
        """All that the budget allows."""
        stages: dict[str, Callable[[torch.device], Part]] = {
            "explanations": self._probed.answers,
            "UniCAM": self._probed.transfer,
        }
        if self._probed.regions is not None:
            stages["regions"] = self._probed.seen
        found = Part()
        for place, (name, stage) in enumerate(stages.items()):
            if place and self._agreed(self.budget.over(), together):
                left = ", ".join(list(stages)[list(stages).index(name) :])
                return found | Part(reasons={left: f"skipped after max_seconds={self.budget.max_seconds}"})
            found |= stage(device)
        return found

    def _agreed(self, said: bool, together: bool) -> bool:
        return ranks.agreed(said, self.student) if together else said

    def _warn(self) -> None:
        """Every reason once in a run: a dead layer stays dead, and a tracker full of NaN tells nobody."""
        new = {reason for reason in self.reasons.values() if reason not in self._warned}
        for reason in sorted(new):
            where = ", ".join(name for name, said in self.reasons.items() if said == reason)
            warn_user(f"The monitor has no value for {where}: {reason}.", UserWarning)
        self._warned |= new


def _images_and_labels(probe: Probe) -> tuple[Tensor, Tensor | None]:
    """The probe's images [n, C, H, W] and labels, if it has any."""
    if isinstance(probe, Tensor):
        images, labels = probe, None
    elif isinstance(probe, (tuple, list)) and len(probe) == 2:
        images, labels = probe
    else:
        raise ValueError(PROBE.format(_said(probe)))
    fits = isinstance(images, Tensor) and images.ndim == 4 and len(images) > 0
    if not fits or not isinstance(labels, (Tensor, type(None))):
        raise ValueError(PROBE.format(_said(probe)))
    return images, labels


def _check_masks(masks: Tensor | None) -> None:
    if masks is not None and not (isinstance(masks, Tensor) and masks.ndim == 3):
        raise ValueError(
            f"Expected masks as a tensor [n, H, W], but got {_said(masks)}. e2kd.metrics.box_masks makes them of boxes."
        )


def _said(value: object) -> str:
    """What came, in a few words.

    >>> _said((torch.zeros(2, 3), None)), _said({"image": 0})
    ('a tuple of a tensor [2, 3], NoneType', "a dict of 'image'")
    """
    if isinstance(value, Tensor):
        return f"a tensor {shape(value.shape)}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} of {', '.join(map(repr, value))}"
    if isinstance(value, (tuple, list)) and len(value) <= 3:
        return f"a {type(value).__name__} of {', '.join(map(_said, value)) or 'nothing'}"
    return type(value).__name__


def _check(count: int, **others: Tensor | None) -> None:
    for name, other in others.items():
        if other is not None and len(other) != count:
            raise ValueError(f"Expected {name} of the probe's {count} images, but got {shape(other.shape)}.")
