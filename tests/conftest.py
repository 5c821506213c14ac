"""What all tests share: real data outside of the repository, seeded random numbers, few threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """No test depends on the random numbers that the tests before it drew: their order changes from run to run."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """A path in the shared data. Missing data skips with a reason; where E2KD_SHARED is set it is a failure."""

    def find(relative: str) -> Path:
        told = os.environ.get("E2KD_SHARED")
        path = Path(told or ROOT.parent / "shared") / relative
        if not path.exists():
            reason = f"needs {path}; set E2KD_SHARED to the folder with the real data"
            (pytest.fail if told else pytest.skip)(reason)
        return path

    return find


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tiny tensors are several times faster so. A module asks for it by `pytestmark`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The tiny folder of a full-scale layout, made once. Tests that change it take a copy."""
    from benchmarks.full_scale_folders import FOLDERS

    made: dict[str, Path] = {}

    def find(layout: str) -> Path:
        if layout not in made:
            made[layout] = tmp_path_factory.mktemp(layout) / "data"
            FOLDERS[layout](made[layout])
        return made[layout]

    return find


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """Accelerate's state is the process's: the next test finds none."""
    from tests.full_scale_cases import reset

    yield
    reset()
