"""What all rivals have in common: a criterion around another one that also compares student and teacher."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from e2kd.baselines.pairs import Batch, Pair
from e2kd.baselines.untrained import Watch
from e2kd.bcos.images import as_encoded
from e2kd.capture import Tap
from e2kd.errors import UnsupportedModel, check_weight, shape, taking_images, warn_user
from e2kd.forward import Forward
from e2kd.guards import EXAMPLE, check_batch, check_example, check_module, check_not_empty, check_settled
from e2kd.lessons import Prepared
from e2kd.listening import Ear, Heard
from e2kd.modes import device_of, dtype_of, unwrap
from e2kd.normalization import Normalization
from e2kd.probing import accepted_images, refusal
from e2kd.showing import shown
from e2kd.similarity import at_least_float32
from e2kd.stages import Layers, Stage
from e2kd.tasks import reported
from e2kd.teacher import OTHER_IMAGES, Asking, Teacher
from e2kd.wrapping import Wrapping

if TYPE_CHECKING:
    from typing_extensions import TypedDict

    class Settings(TypedDict, total=False):
        """What every rival takes besides its own settings."""

        warmup: int
        input_normalization: Normalization | None
        teacher_normalization: Normalization | None
        teacher_size: int | tuple[int, int] | None
        example: Tensor | None


Module = TypeVar("Module", bound=nn.Module)
FROZEN = (
    "{name} compares features inside of teacher and student, and a frozen teacher keeps its logits and maps alone. "
    "Pass the live teacher. With the cache there are DKD, KD and e²KD: E2KDLoss(student, frozen, ...)."
)
NO_EXAMPLE = (
    "No usual image size runs through {name}, so its layers can't be found. Pass example=images, a batch [B, C, H, W] "
    "as the student will be given."
)
NO_COMMON = (
    "No usual image size runs through both {student} and its teacher {teacher}, so their layers can't be found. Of "
    "images {images} the teacher says: {error}. Pass example=images, a batch [B, C, H, W] as the student will be "
    "given, or the side of the teacher's as teacher_size=."
)
NO_PICKLE = (
    "{name} listens to its student in this process, so it can't be pickled or copied. Save the student and "
    "criterion.state_dict(), and build the criterion anew where they are loaded."
)
ELSEWHERE = (
    "The features are on {device} but the trainable parts of {name} on {where}. They belong to the criterion, so move "
    "it: criterion.to({device!r}), before the optimizer is made."
)
FIXED = (
    "No feature that {name} compares has a graph, so it teaches the student nothing: the layers that make them are "
    "frozen, or run under no_grad. Train them, or name later layers through layers=."
)
BORROWED = (
    "{name} reads the student's classifier, but the student ran with other parameters than its own, as in "
    "torch.func.functional_call. Call the student itself."
)
NOT_HEARD = (
    "The student ran, but {layer!r} did not, or returned no tensor with gradients. Name other layers through layers=."
)
NOT_TOLD = (
    "The teacher ran, but some of its layers {layers}, which were found on other images, did not run this time. Name "
    "others through teacher_layers=, or pass example=images of the kind that you train with."
)


class Baseline(Wrapping, ABC):
    """A distillation method around any criterion: loss = criterion(outputs, targets) + weight * term.

    Called as `E2KDLoss` is, and it may stand in the place of its criterion, which gives the method with e²KD on top:
    `E2KDLoss(student, teacher, CRD(student, teacher, criterion))`. The teacher then runs once a step, and the student's
    forward is always the trainer's own. In eval mode or under `no_grad` it is the plain task loss. `.parts` holds
    detached scalars of the last training call: loss, task (all of the criterion's loss) and the method's term, without
    its weight.

    A method of your own says which layers it compares, by `choose`, and computes its `term` from a `Batch` of what they
    returned; `name` is the term's in `.parts`, `shows` are attributes for its `repr`. One that
    compares logits alone leaves `choose` out, and takes frozen teachers if it sets `takes_features = False`.

    Trainable parts, where a method has them, are its parameters, beside those of `criterion`: give them to the
    optimizer, `SGD([*student.parameters(), *criterion.parameters()])`, and save `criterion.state_dict()` with
    the checkpoint. They exist from the start, on the student's device. With several processes wrap the criterion as the
    student is wrapped: `DistributedDataParallel(criterion, broadcast_buffers=False)`, or `accelerator.prepare`. With
    no criterion, layers of the student past the compared ones get a gradient of 0.

    Args:
        student: the module being trained, before or after it is wrapped by its trainer.
        teacher: a module, moved to its device by you, or a timm name; never trained, always in eval mode.
        criterion: the criterion you had; None for the term alone.
        weight: of the term.
        choose: function of a pair of networks that returns the stages of both to compare, (student's, teacher's), in
            whose order `Batch` has their maps: `pair.stages(layers, teacher_layers)` are the named modules, or up to
            four of each network where None is named; `pair.student` and `pair.teacher` have `named`, `stages`,
            `blocks`, `embedding` and `before_activation`. None compares no features.
        warmup: steps over which the weight grows linearly from 0 to its value.
        input_normalization, teacher_normalization, teacher_size: as of `E2KDLoss`. Without any of them a criterion
            inside of another asks the teacher as the outer one does.
        example: images [B, C, H, W] to find layers with; None makes noise of a usual size that runs through both.

    Raises:
        UnsupportedModel: when a layer is not there or returns no map, and for a frozen teacher, which has no features,
            unless the method takes none.
        TypeError: for networks that are no modules, and for the name of one layer in the place of a list.
        ValueError: for settings outside their range, unequal numbers of named layers, and networks that no usual image
            size runs through; its message says what to do.

    >>> class Means(Baseline):
    ...     name = "means"
    ...
    ...     def __init__(self, student, teacher, criterion=None, weight=1.0, **settings):
    ...         super().__init__(student, teacher, criterion, weight, lambda pair: pair.stages(None, None), **settings)
    ...
    ...     def term(self, batch):
    ...         pairs = zip(batch.student, batch.teacher)
    ...         return sum((mine.mean(1) - theirs.mean(1)).square().mean() for mine, theirs in pairs)
    >>> net = lambda width: nn.Sequential(
    ...     nn.Conv2d(3, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5))
    >>> student, teacher = net(4), net(8)
    >>> criterion = Means(student, teacher, nn.CrossEntropyLoss())
    >>> criterion(student(torch.rand(2, 3, 32, 32)), torch.tensor([0, 3])).backward()
    >>> sorted(criterion.parts)
    ['loss', 'means', 'task']
    """

    name: ClassVar[str]  # of the term, in `.parts`
    takes_features = True
    reads_weights = False  # of the student, which must then be those that made its logits
    shows: ClassVar[tuple[str, ...]] = ()  # attributes with settings of its own, for `repr`
    step: Tensor

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | str | Prepared,
        criterion: Callable[..., Tensor] | None,
        weight: float,
        choose: Callable[[Pair], tuple[list[Stage], list[Stage]]] | None = None,
        *,
        warmup: int = 0,
        input_normalization: Normalization | None = None,
        teacher_normalization: Normalization | None = None,
        teacher_size: int | tuple[int, int] | None = None,
        example: Tensor | None = None,
    ) -> None:
        super().__init__(criterion)
        check_module(student, "student")
        check_weight("weight", weight)
        if not warmup >= 0 or warmup % 1:
            raise ValueError(f"Expected warmup to be a number of steps >= 0, but got {warmup}.")
        self.weight, self.warmup, self.watch = weight, warmup, Watch()
        self.register_buffer("step", torch.zeros((), dtype=torch.long, device=_device(student)), warmup > 0)
        self._model = [unwrap(student)]  # in a list: neither network is a submodule
        self.teacher = self._asked(teacher, Asking(teacher_normalization, input_normalization, teacher_size))
        self.student_stages: list[Stage] = []
        self.teacher_stages: list[Stage] = []
        if choose is not None:
            self.student_stages, self.teacher_stages = choose(self._layers(example))
        self.ear: Ear | None = None
        if isinstance(self.teacher, Teacher):
            self.ear = self.teacher.listen(stage.place for stage in self.teacher_stages)
        self._share_teacher()
        self.tap = Tap(self.student)
        self.tap.notes_parameters = self.reads_weights
        weakref.finalize(self, self.tap.remove)
        self.tap.listen(stage.place for stage in self.student_stages)

    @abstractmethod
    def term(self, batch: Batch) -> Tensor:
        """The method's loss [] for a batch, without its weight."""

    def extra_repr(self) -> str:
        """The settings, and the layers that are compared, if any are."""
        stages = {"layers": self.student_stages, "teacher_layers": self.teacher_stages}
        compared = {name: [stage.place.key for stage in found] for name, found in stages.items() if found}
        own = {name: getattr(self, name) for name in self.shows}
        return shown(weight=self.weight, warmup=self.warmup, **own, **compared)

    @property
    def part_names(self) -> tuple[str, ...]:
        """What its parts are called, but the loss."""
        return ("task", self.name)

    @property
    def student(self) -> nn.Module:
        """The network that is trained."""
        return self._model[0]

    def remove(self) -> None:
        """Take every hook off the student, those of an e2kd criterion inside too. Neither can teach afterwards.

        It happens by itself when nobody holds the criterion any more.
        """
        super().remove()
        if isinstance(self.teacher, Teacher):
            self.teacher.dismiss(self.ear)

    def _teach(self, outputs: Any, logits: Tensor, targets: Any, options: dict[str, Any]) -> Tensor:
        check_not_empty(logits)
        forward = self.tap.forward_of(logits)
        if self.reads_weights and forward.replaced:
            raise UnsupportedModel(BORROWED.format(name=type(self).__name__))
        zero = at_least_float32(logits.new_zeros(()))
        parts = {"task": zero, self.name: zero}
        if self.criterion is not None:  # first, so that this one hears what a criterion inside asks the teacher
            parts["task"] = self._task(outputs, targets, options)
        else:  # the graph of all that made the logits, whose gradients several processes wait for
            parts["task"] = at_least_float32(logits).mean() * 0
        if self.weight != 0:
            with torch.autocast(logits.device.type, enabled=False):
                parts[self.name] = self.term(self._batch(forward, logits, targets))
            self.watch.look(type(self).__name__, self._trainable(), self.student.parameters())
        loss = parts["task"] + self._weight() * parts[self.name]
        self._parts = reported(self.criterion, parts, loss)
        return loss

    def __reduce__(self) -> Any:
        raise TypeError(NO_PICKLE.format(name=type(self).__name__))

    def beside_student(self, part: Module) -> Module:
        """A trainable part on the student's device, in its precision but no less than float32."""
        dtype = torch.promote_types(dtype_of(self.student), torch.float32)
        return part.to(_device(self.student), dtype)

    def no_term(self, batch: Batch) -> Tensor:
        """A term [] of 0, for one image, of whose numbers batch norm has no variance.

        It has the graph of the student's features and of every trainable part, whose gradients several processes wait
        for.
        """
        return sum(
            (value.sum() * 0 for value in (*batch.student, *self._trainable())),
            batch.student_logits.new_zeros(()),
        )

    def _trainable(self) -> Iterator[nn.Parameter]:
        for name, module in self.named_children():
            if name != "criterion":
                yield from module.parameters()

    def _weight(self) -> Tensor | float:
        if not self.warmup:
            return self.weight
        self.step += 1
        return self.weight * (self.step / self.warmup).clamp(max=1)

    def _asked(self, teacher: nn.Module | str | Prepared, asking: Asking) -> Teacher | Prepared:
        if isinstance(teacher, Prepared):
            if self.takes_features:
                raise UnsupportedModel(FROZEN.format(name=type(self).__name__))
            check_settled(asking)
            return teacher
        if not isinstance(teacher, str):
            check_module(teacher, "teacher")
        return Teacher(teacher, None, asking).beside(self.student)

    def _layers(self, example: Tensor | None) -> Pair:
        check_example(example)
        assert isinstance(self.teacher, Teacher)
        return self._found(self.teacher) if example is None else self._found_on(example, self.teacher)

    def _found_on(self, example: Tensor, teacher: Teacher) -> Pair:
        images = example[:2].to(_device(self.student), dtype_of(self.student))
        with taking_images("student", self.student, images.shape, EXAMPLE):
            mine = Layers(self.student, images)
        prepared = teacher.prepared(images.to(_device(teacher.model)))
        with taking_images("teacher", teacher.model, prepared.shape, OTHER_IMAGES):
            return Pair(mine, Layers(teacher.model, prepared))

    def _found(self, teacher: Teacher) -> Pair:
        student, model = self.student, teacher.model
        refused = None
        for images in self._examples(teacher):
            prepared = teacher.prepared(images.to(_device(model)))
            refused = refusal(model, prepared)
            if refused is None:
                return Pair(Layers(student, images), Layers(model, prepared))
        if refused is None:
            raise ValueError(NO_EXAMPLE.format(name=type(student).__name__))
        names = {"student": type(student).__name__, "teacher": type(model).__name__}
        raise ValueError(NO_COMMON.format(**names, images=shape(prepared.shape), error=refused)) from refused

    def _examples(self, teacher: Teacher) -> Iterator[Tensor]:
        """Noise of every usual size that runs through the student."""
        resized = teacher.size is not None  # whatever it is given
        for noise in accepted_images(self.student, *([] if resized else [teacher.model])):
            yield as_encoded(noise.sigmoid(), self.student)  # as B-cos networks take them, which others don't mind

    def _batch(self, forward: Forward, logits: Tensor, targets: Any) -> Batch:
        heard = self._ask(forward, targets)
        check_batch(logits, heard.logits)
        dtype = self._dtype(logits.device)
        mine = [_maps(stage, forward.heard.get(stage.place.key), forward.size) for stage in self.student_stages]
        if mine and not any(maps.requires_grad for maps in mine):
            warn_user(FIXED.format(name=type(self).__name__))
        theirs = [_maps(stage, heard.tensors.get(stage.place.key), heard.size) for stage in self.teacher_stages]
        return Batch(
            [at_least_float32(m) if dtype is None else m.to(dtype) for m in mine],
            [at_least_float32(m) if dtype is None else m.to(dtype) for m in theirs],
            logits,
            heard.logits,
            targets,
            self._labels(targets),
        )

    def _ask(self, forward: Forward, targets: Any) -> Heard:
        """What the teacher says of the recorded images; not asked again if somebody else has just done so."""
        taught = self._taught(targets, forward.images)
        if taught is not None:
            return Heard(forward.images, (0, 0), taught.logits, {})
        assert isinstance(self.teacher, Teacher)
        assert self.ear is not None
        found = self.ear.take(forward.images)
        if found is None:
            with forward.autocasting():
                self.teacher.logits(forward.images)
            found = self.ear.take(forward.images)
        if found is None:
            raise RuntimeError(NOT_TOLD.format(layers=sorted({place.module for place in self.ear.places})))
        return found

    def _dtype(self, device: torch.device) -> torch.dtype | None:
        """The type the trainable parts compute in, None where there are none."""
        first = next(self._trainable(), None)
        if first is not None and first.device != device:
            raise RuntimeError(ELSEWHERE.format(device=str(device), name=type(self).__name__, where=first.device))
        return None if first is None else first.dtype


def _device(module: nn.Module) -> torch.device:
    return device_of(module, torch.device("cpu"))


def _maps(stage: Stage, tensor: Tensor | None, size: tuple[int, int]) -> Tensor:
    if tensor is None:
        raise RuntimeError(NOT_HEARD.format(layer=stage.place.module))
    return stage.maps(tensor, size)
