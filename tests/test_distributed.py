"""Two processes give the gradient of one process on the joint batch, or refuse with a sentence."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from baseline_cases import CASES as RIVALS
from baseline_cases import joint_batch, of_rank, ranks_criterion
from distributed_worker import GROUPS, RANKS, joint_case, run_group
from reference import error, gradient, reference_loss, reference_step
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")
Results = list[dict[str, Any]]


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run_group("ddp", tmp_path_factory.mktemp("ddp"))


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run_group("fsdp", tmp_path_factory.mktemp("fsdp"))


@lru_cache
def expected(name: str, kind: str = "") -> torch.Tensor:
    """The reference gradient of the joint batch in one process."""
    made = joint_case(name, eval_norm=kind != "train_batchnorm")
    student = made.copy()
    if kind == "dead":  # the second half teaches by task and logits alone
        losses = [reference_loss(student, made.half(0)), reference_loss(student, made.half(1), weight=0)]
    elif kind == "train_batchnorm":  # every rank normalises by its own part
        losses = [reference_loss(student, made.half(rank)) for rank in range(RANKS)]
    else:
        return reference_step(student, made)[1]
    (sum(losses) / RANKS).backward()
    return torch.cat([p.grad.flatten() for p in student.parameters()])


def _wanted(label: str) -> torch.Tensor:
    name, kind = label.split("-")[:2]
    return expected(name, "dead" if kind.startswith("dead") else kind if kind == "train_batchnorm" else "")


WRONG_UNDER_STATIC_GRAPH = "branching-static_graph"
FROZEN = ["cnn-frozen", "vit-frozen"]


def test_student_that_needs_its_own_graph_is_refused_under_a_static_graph(ddp: Results) -> None:
    for rank in ddp:
        assert rank[WRONG_UNDER_STATIC_GRAPH]["refusal"].startswith("UnsupportedModel")
        assert "static_graph=False" in rank[WRONG_UNDER_STATIC_GRAPH]["refusal"]


@pytest.mark.parametrize("label", sorted(GROUPS["ddp"].keys() - {WRONG_UNDER_STATIC_GRAPH, *FROZEN, *RIVALS}))
def test_gradients_under_ddp_are_equal_on_all_ranks_and_those_of_one_process(label: str, ddp: Results) -> None:
    found = [rank[label] for rank in ddp]
    assert "refusal" not in found[0], found[0]
    for step in (0, 1):
        assert torch.equal(found[0][f"gradient{step}"], found[1][f"gradient{step}"])
        assert error(found[0][f"gradient{step}"], _wanted(label)) < 1e-5


@pytest.mark.parametrize("label", FROZEN)
def test_two_processes_freeze_and_train_from_one_cache(label: str, ddp: Results) -> None:
    """Logits and maps went through 16 bits."""
    first, second = (rank[label] for rank in ddp)
    assert "refusal" not in first, first
    assert torch.equal(first["gradient"], second["gradient"])
    assert error(first["gradient"], _wanted(label)) < 2e-3


@pytest.mark.parametrize("label", RIVALS)
def test_gradients_of_student_and_parts_with_a_rival_are_the_mean_of_all_ranks(label: str, ddp: Results) -> None:
    """e²KD on top of the rival; the criterion is wrapped by DistributedDataParallel where it has parameters."""
    first, second = (rank[label] for rank in ddp)
    assert "refusal" not in first, first
    assert torch.equal(first["gradient"], second["gradient"])
    alone = []
    for rank in range(RANKS):
        student, criterion = ranks_criterion(label.removeprefix("rival-"))
        images, targets = of_rank(joint_batch(), rank)
        criterion(student(images), targets).backward()
        alone.append(gradient(nn.ModuleList([student, criterion])))
    torch.testing.assert_close(first["gradient"], torch.stack(alone).mean(0), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("label", GROUPS["fsdp"])
def test_gradients_under_fsdp_are_those_of_one_process(label: str, fsdp: Results) -> None:
    for rank in (results[label] for results in fsdp):
        assert "refusal" not in rank, rank
        for step in (0, 1):
            assert error(rank[f"gradient{step}"], _wanted(label)) < 1e-5
