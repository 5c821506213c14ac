"""What two processes do in the distributed tests, and how a test starts them: `python distributed_worker.py GROUP OUT`.

A group is a list of cases that share one start. Every case trains one student and reports, per rank, its loss and
whole gradient, or the sentence it was refused with.
"""

from __future__ import annotations

import contextlib
import copy
import os
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

sys.path.insert(0, str(Path(__file__).parent))

import baseline_cases
import reference
import transfer_cases

import e2kd

RANKS = 2
BATCH = 8  # of all ranks together
Result = dict[str, Any]


# The cases of a test's two processes, as one batch


def joint_case(name: str, *, eval_norm: bool = True, **settings: Any) -> reference.Case:
    if name in ("small", "hidden", "branching"):
        made = reference.case("cnn", batch=BATCH)
        student = reference.Branching() if name == "branching" else reference.small(hidden=name == "hidden")
        layer = "trunk" if name == "branching" else "3"
        made = reference.Case(**{**made.__dict__, "student": student, "layer": layer})
    elif name == "bcos":
        made = reference.bcos_case(batch=BATCH)
    else:
        made = reference.case(name, batch=BATCH, **settings)
    if eval_norm:
        reference.freeze_statistics(made.student)
    return made


def of_rank(made: reference.Case) -> reference.Case:
    return made.half(dist.get_rank())


def _result(student: nn.Module, loss: Tensor) -> Result:
    return {"loss": loss.detach(), "gradient": reference.gradient(student)}


class DeadOnSecondRank:
    """GradCAM whose maps are all zero on rank 1."""

    layer = None

    def __call__(self, features: Tensor, gradient: Tensor) -> Tensor:
        return e2kd.GradCAM()(features, gradient) * (dist.get_rank() == 0)


# DistributedDataParallel


def ddp(
    name: str,
    *,
    before: bool = True,
    no_sync: bool = False,
    compiled: str = "",
    eval_norm: bool = True,
    explainer: Any = None,
    teacher_explainer: Any = None,
    settings: dict[str, Any] | None = None,
    **wrap: Any,
) -> Result:
    made = of_rank(joint_case(name, eval_norm=eval_norm, **(settings or {})))
    student = made.copy()

    def build(model: nn.Module) -> e2kd.E2KDLoss:
        return e2kd.E2KDLoss(
            model, made.teacher, nn.CrossEntropyLoss(), explainer=explainer, teacher_explainer=teacher_explainer
        )

    criterion = build(student) if before else None
    inner = torch.compile(student, backend="aot_eager") if compiled == "inside" else student
    model: Any = DistributedDataParallel(inner, **wrap)
    criterion = criterion or build(model)
    if compiled == "outside":
        model = torch.compile(model, backend="aot_eager")
    parts = [made.half(0), made.half(1)] if no_sync else [made]
    result: Result = {}
    for step in range(2):  # static graphs change after the first
        student.zero_grad()
        torch.manual_seed(step + 10 * dist.get_rank())
        loss = made.images.new_zeros(())
        for index, part in enumerate(parts):
            last = index == len(parts) - 1
            with contextlib.nullcontext() if last else model.no_sync():
                term = criterion(model(part.images), part.targets) / len(parts)
                term.backward()
            loss += term.detach()
        result |= {f"{key}{step}": value for key, value in _result(student, loss).items()}
    return result


def frozen_ddp(name: str) -> Result:
    """The ranks freeze half of the data set each, and train from the one cache."""
    made, folder = joint_case(name), Path(sys.argv[2]) / f"cache-{name}"
    data = TensorDataset(made.images, made.targets)
    e2kd.freeze(made.teacher, data, folder, shard_rows=BATCH // RANKS, progress=False)
    dist.barrier()
    cache, student = e2kd.FrozenTeacher.open(folder), made.copy()
    model = DistributedDataParallel(student)
    criterion = e2kd.E2KDLoss(model, cache, nn.CrossEntropyLoss())
    dataset = e2kd.FrozenDataset(data, cache)
    sampler = DistributedSampler(dataset, shuffle=False)
    images, taught = next(iter(DataLoader(dataset, BATCH // RANKS, sampler=sampler)))
    loss = criterion(model(images), taught)
    loss.backward()
    return _result(student, loss)


# FSDP2


def fsdp(name: str, shard: Callable[..., None], *, before: bool = True, math: bool = False, **settings: Any) -> Result:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    made = of_rank(joint_case(name))
    student = made.copy()
    fully = partial(fully_shard, mesh=init_device_mesh("cpu", (RANKS,)))
    criterion = e2kd.E2KDLoss(student, made.teacher, nn.CrossEntropyLoss(), **settings) if before else None
    shard(student, fully)
    criterion = criterion or e2kd.E2KDLoss(student, made.teacher, nn.CrossEntropyLoss())
    result = {}
    for step in range(2):
        student.zero_grad()
        with sdpa_kernel(SDPBackend.MATH) if math else contextlib.nullcontext():
            outputs = student(made.images)
        loss = criterion(outputs, made.targets)
        loss.backward()
        result |= {f"loss{step}": loss.detach(), f"gradient{step}": reference.gradient(student)}
    return result


def _layers(student: nn.Module) -> list[nn.Module]:
    names = ("layer1", "layer2", "layer3", "layer4")
    return [getattr(student, n) for n in names if hasattr(student, n)] or list(student.blocks)


def shard_root(student: nn.Module, fully: Any, **settings: Any) -> None:
    fully(student, **settings)


def shard_layers(student: nn.Module, fully: Any, **settings: Any) -> None:
    for layer in _layers(student):
        fully(layer)
    fully(student, **settings)


def shard_trunk(student: nn.Module, fully: Any) -> None:
    """Every layer in its own group but the last, which the root holds with the rest of the head."""
    for layer in _layers(student)[:-1]:
        fully(layer)
    fully(student)


def shard_kept(student: nn.Module, fully: Any) -> None:
    """Every layer in its own group, which keeps its parameters until backward."""
    for layer in _layers(student):
        fully(layer, reshard_after_forward=False)
    fully(student, reshard_after_forward=False)


def shard_head(student: nn.Module, fully: Any, **settings: Any) -> None:
    fully(student.get_classifier())
    fully(student, **settings)


# Hosts


def accelerate(name: str, *, before: bool) -> Result:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)  # starts the process group
    assert accelerator.num_processes == RANKS
    made = of_rank(joint_case(name))
    student = made.copy()
    criterion = e2kd.E2KDLoss(student, made.teacher, nn.CrossEntropyLoss()) if before else None
    model, optimizer = accelerator.prepare(student, torch.optim.SGD(student.parameters(), 0.1))
    criterion = criterion or e2kd.E2KDLoss(model, made.teacher, nn.CrossEntropyLoss())
    losses, result = [], {}
    for part in (made.half(0), made.half(1)):
        with accelerator.accumulate(model):
            loss = criterion(model(part.images), part.targets)
            accelerator.backward(loss)
            losses.append(loss.detach())
            if accelerator.sync_gradients:
                result = {"loss0": sum(losses) / 2, "gradient0": reference.gradient(student)}
            optimizer.step()
            optimizer.zero_grad()
    return result


def timm_task(name: str, *, e2kd_task: bool = False) -> Result:
    from timm.task import ClassificationTask

    from e2kd.trainers.timm import E2KDTask

    made = of_rank(joint_case(name))
    student, device = made.copy(), torch.device("cpu")
    task: Any
    if e2kd_task:
        task = E2KDTask(student, made.teacher, nn.CrossEntropyLoss(), verbose=False)
        task.prepare_distributed(device_ids=[device])  # as timm's train.py calls it
    else:
        criterion = e2kd.E2KDLoss(student, made.teacher, nn.CrossEntropyLoss())
        task = ClassificationTask(student, criterion=criterion, device=device, verbose=False)
        task.prepare_distributed()
    task.train()
    reference.freeze_statistics(student)
    result = task(made.images, made.targets)
    result["loss"].backward()
    return {"loss0": result["loss"].detach(), "gradient0": reference.gradient(student)}


def accelerate_dead(name: str) -> Result:
    """One process has nothing to explain; the parts that are logged are means of both."""
    from accelerate import Accelerator

    from e2kd.trainers.accelerate import Parts

    accelerator, made = Accelerator(cpu=True), of_rank(joint_case(name))
    student = made.copy()
    dead = {"explainer": DeadOnSecondRank(), "teacher_explainer": e2kd.GradCAM()}
    criterion = e2kd.E2KDLoss(student, made.teacher, nn.CrossEntropyLoss(), **dead)
    model, parts = accelerator.prepare(student), Parts(accelerator, criterion)
    reference.freeze_statistics(student)
    loss = criterion(model(made.images), made.targets)
    accelerator.backward(loss)
    own = float(criterion.parts["task"])
    logged = {name: torch.tensor(value) for name, value in parts.log(1).items()}
    return {"loss0": loss.detach(), "gradient0": reference.gradient(student), "task": torch.tensor(own)} | logged


def transformers_trainer(name: str) -> Result:
    """Hugging Face's Trainer counts the samples of both processes."""
    import transformers as hf
    from torch.utils.data import TensorDataset, default_collate

    from e2kd.trainers.transformers import E2KDCallback

    made, folder = joint_case(name), str(Path(sys.argv[2]) / "trainer")
    student = made.copy()
    found: Result = {}

    class Keep(hf.TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
            found["gradient0"] = reference.gradient(model)

    arguments = hf.TrainingArguments(
        folder, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", max_steps=1, logging_steps=1,
        remove_unused_columns=False, max_grad_norm=0.0, per_device_train_batch_size=BATCH // RANKS // 2,
        gradient_accumulation_steps=2, learning_rate=0.0,
    )  # fmt: skip
    trainer = hf.Trainer(
        student, arguments, train_dataset=TensorDataset(made.images, made.targets), callbacks=[Keep()],
        data_collator=lambda samples: dict(zip(("x", "labels"), default_collate(samples), strict=True)),
        compute_loss_func=e2kd.E2KDLoss(student, made.teacher, nn.CrossEntropyLoss()),
    )  # fmt: skip
    trainer.add_callback(E2KDCallback(trainer))
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "e2kd/kd" in entry)
    return found | {name: torch.tensor(value) for name, value in logged.items() if name.startswith("e2kd/")}


GROUPS: dict[str, dict[str, Callable[[], Result]]] = {
    "ddp": {
        **{
            f"{name}-{label}": partial(ddp, name, **settings)
            for name in ("cnn", "vit")
            for label, settings in {
                "plain": {},
                "criterion_after": {"before": False},
                "static_graph": {"static_graph": True},
                "static_graph_criterion_after": {"static_graph": True, "before": False},
                "find_unused": {"find_unused_parameters": True},
                "no_sync": {"no_sync": True},
                "bucket_view": {"gradient_as_bucket_view": True},
                "train_batchnorm": {"eval_norm": False},
                "dead_on_one_rank": {"explainer": DeadOnSecondRank(), "teacher_explainer": e2kd.GradCAM()},
                "dead_on_one_rank_static": {
                    "explainer": DeadOnSecondRank(),
                    "teacher_explainer": e2kd.GradCAM(),
                    "static_graph": True,
                },
            }.items()
        },
        **{
            f"bcos-{label}": partial(ddp, "bcos", **settings)
            for label, settings in {
                "plain": {},
                "separate": {"explainer": e2kd.BcosWeights(passes="separate")},
                "static_graph": {"static_graph": True},
                "find_unused": {"find_unused_parameters": True},
                "no_sync": {"no_sync": True, "before": False},
                "train_batchnorm": {"eval_norm": False},
            }.items()
        },
        "branching-plain": partial(ddp, "branching"),
        "branching-static_graph": partial(ddp, "branching", static_graph=True),
        **{f"{name}-frozen": partial(frozen_ddp, name) for name in ("cnn", "vit")},
        "small-compiled_inside": partial(ddp, "small", compiled="inside"),
        "small-compiled_outside": partial(ddp, "small", compiled="outside"),
        **baseline_cases.CASES,
    },
    "fsdp": {
        f"{name}-{shard.__name__}-{label}": partial(fsdp, name, partial(shard, **settings), **how)
        for name in ("cnn", "vit")
        for shard in (shard_root, shard_layers, shard_head)
        for label, how, settings in (
            ("default", {}, {}),
            ("reshard", {}, {"reshard_after_forward": True}),
            ("criterion_after", {"before": False}, {}),
        )
    }
    | {
        "cnn-shard_trunk": partial(fsdp, "cnn", shard_trunk),
        "vit-shard_trunk-default": partial(fsdp, "vit", shard_trunk),
        "vit-shard_trunk-criterion_after": partial(fsdp, "vit", shard_trunk, before=False),
        "hidden-shard_root-default": partial(fsdp, "hidden", shard_root),
        "convnext-shard_root-default": partial(fsdp, "convnext", shard_root),
        "cnn-shard_kept": partial(fsdp, "cnn", shard_kept),
        "bcos-shard_root-default": partial(fsdp, "bcos", shard_root),
        "bcos-shard_root-reshard": partial(fsdp, "bcos", partial(shard_root, reshard_after_forward=True)),
        "bcos-shard_root-separate": partial(fsdp, "bcos", shard_root, explainer=e2kd.BcosWeights(passes="separate")),
        # torch dies of a double backward through parameters that it takes back in between
        "hidden-shard_root-reshard": partial(fsdp, "hidden", partial(shard_root, reshard_after_forward=True)),
        "vit-shard_root-math": partial(fsdp, "vit", partial(shard_root, reshard_after_forward=True), math=True),
        "vit-shard_layers-math": partial(fsdp, "vit", shard_layers, math=True),
        "vit-shard_head-math": partial(fsdp, "vit", shard_head, math=True),
        "vit-shard_kept": partial(fsdp, "vit", shard_kept),
    },
    "hosts": {
        "cnn-accelerate-criterion_first": partial(accelerate, "cnn", before=True),
        "vit-accelerate-prepare_first": partial(accelerate, "vit", before=False),
        "cnn-timm": partial(timm_task, "cnn"),
        "vit-timm": partial(timm_task, "vit"),
        "vit-timm_e2kd": partial(timm_task, "vit", e2kd_task=True),
        "cnn-accelerate_dead": partial(accelerate_dead, "cnn"),
        "vit-transformers": partial(transformers_trainer, "vit"),
    },
    "transfer": transfer_cases.CASES,
}


def run_group(group: str, folder: Path, timeout: float = 300) -> list[dict[str, Result]]:
    """The results of every case of a group, for each rank. Raises if a process fails or hangs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in range(RANKS):
        told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS}
        told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1, "ACCELERATE_USE_CPU": "true"}
        environment = os.environ | {key: str(value) for key, value in told.items()}
        command = [sys.executable, __file__, group, str(folder)]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    try:
        said = [process.communicate(timeout=timeout)[0].decode() for process in processes]
    finally:
        for process in processes:
            process.kill()
    codes = [process.returncode for process in processes]
    assert codes == [0] * RANKS, f"exit codes {codes}\n" + "\n".join(said)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


def main(group: str, folder: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if group != "hosts":  # there accelerate does it
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    results = {}
    for name, work in GROUPS[group].items():
        try:
            results[name] = work()
        except (RuntimeError, ValueError, NotImplementedError) as refusal:
            results[name] = {"refusal": f"{type(refusal).__name__}: {refusal}"}
        if "compiled" in name:
            torch._dynamo.reset()
        dist.barrier()
    torch.save(copy.deepcopy(results), Path(folder) / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
