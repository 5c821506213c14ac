"""The oldest versions that e2kd promises are those that are tried."""

from __future__ import annotations

import configparser
import os
import tempfile
from pathlib import Path

import pytest

from benchmarks.common import ROOT
from benchmarks.versions import OLDEST, NoRegistry, install, passes
from e2kd.trainers.timm import version


def test_the_oldest_timm_with_tasks_is_the_one_that_is_tried() -> None:
    assert OLDEST["timm's tasks"].packages == (f"timm=={version.OLDEST}",)


def test_the_oldest_torch_is_the_one_that_is_tried() -> None:
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    oldest = settings["options"]["install_requires"].strip().removeprefix("torch>=")
    assert OLDEST["PyTorch"].packages[0] == f"torch=={oldest}.0"


@pytest.mark.slow
@pytest.mark.parametrize("name", OLDEST)
def test_the_oldest_version_passes(name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:  # gigabytes, which pytest's own folders would keep
        try:
            install(OLDEST[name], Path(folder))
        except NoRegistry as error:
            (pytest.fail if os.environ.get("CI") else pytest.skip)(str(error))
        good, said = passes(OLDEST[name], Path(folder))
    assert good, said
