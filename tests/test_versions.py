"""The oldest versions that e2kd promises are those that are tried."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks.versions import OLDEST, NoRegistry, install, passes
from e2kd.trainers.timm import version


def test_the_oldest_timm_with_tasks_is_the_one_that_is_tried() -> None:
    assert OLDEST["timm's tasks"].packages == (f"timm=={version.OLDEST}",)


@pytest.mark.slow
@pytest.mark.parametrize("name", OLDEST)
def test_the_oldest_version_passes(name: str, tmp_path: Path) -> None:
    try:
        install(OLDEST[name].packages, tmp_path)
    except NoRegistry as error:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(str(error))
    good, said = passes(OLDEST[name], tmp_path)
    assert good, said
