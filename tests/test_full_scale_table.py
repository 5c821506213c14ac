"""Full scale: results side by side, if they belong together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.common import write_json
from benchmarks.full_scale_table import report
from benchmarks.limited_training import ARMS as TITLES


def write(
    folder: Path,
    arm: str,
    seed: int,
    accuracy: float,
    recipe: dict[str, Any] | None = None,
    teacher: str | None = None,
    **changed: Any,
) -> None:
    """A result as a run writes it."""
    settings = {"arm": arm, "seed": seed, "split": "test", "temperature": 1.0, "weight": None, "fraction": None}
    settings |= {"recipe": {"lr": 0.1, "epochs": 5} | (recipe or {})} | changed
    row = {name: settings[name] for name in ("split", "arm", "seed", "temperature", "weight")} | {"accuracy": accuracy}
    out = folder / f"{arm}-{seed}-{settings['split']}-{settings['temperature']}-{settings['weight']}"
    write_json(out / "result.json", {"settings": settings, "teacher": teacher, "rows": [row]})


def test_results_side_by_side(tmp_path: Path) -> None:
    for seed, (plain, explained) in enumerate(((0.5, 0.6), (0.6, 0.8))):
        write(tmp_path, "kd", seed, plain)
        write(tmp_path, "e2kd", seed, explained, weight=5.0, fraction=1.0)
    found = report(tmp_path)
    assert "| KD | 1 |  | 2 | 55.0 ±7.1 |" in found
    assert "| e²KD | 1 | 5 | 2 | 70.0 ±14.1 |" in found
    assert "| e²KD - KD | +15.0 (-48.5 to +78.5) |" in found
    assert "validation" not in found
    write(tmp_path / "again", "kd", 1, 0.6)
    with pytest.raises(ValueError, match=r"several of .*seed=1"):
        report(tmp_path)


def test_every_arm_is_compared_with_its_kd(tmp_path: Path) -> None:
    arms = ("cross_entropy", "at", "crd_e2kd", "e2kd_all", "frozen_e2kd_all")
    for arm in ("kd", "frozen_kd", *arms):
        write(tmp_path, arm, 0, 0.7 if arm in arms else 0.5)
    found = report(tmp_path)
    for arm in arms:
        base = "frozen KD" if arm.startswith("frozen") else "KD"
        assert f"| {TITLES[arm]} - {base} | +20.0 (1 pair, no interval) |" in found


def test_arms_without_a_seed_in_common_have_no_difference(tmp_path: Path) -> None:
    for arm, seed in (("kd", 0), ("e2kd", 1)):
        write(tmp_path, arm, seed, 0.5)
    assert "| e²KD - KD |  |" in report(tmp_path)


def test_what_a_grid_found_is_shown_by_arm_and_setting(tmp_path: Path) -> None:
    for temperature, weight, seed, accuracy in ((1.0, 1.0, 0, 0.5), (1.0, 1.0, 1, 0.7), (5.0, 1.0, 0, 0.4)):
        write(tmp_path, "e2kd", seed, accuracy, split="validation", temperature=temperature, weight=weight)
    found = report(tmp_path)
    assert "validation images" in found
    assert "| e²KD | 1 | 1 | 2 | 60.0 ±14.1 |" in found
    assert "| e²KD | 5 | 1 | 1 | 40.0 |" in found
    write(tmp_path, "e2kd", 0, 0.9, weight=1.0)
    assert report(tmp_path).index("90.0") < report(tmp_path).index("validation images")


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"arm": "kd", "recipe": {"lr": 0.2, "epochs": 9}}, "recipe.epochs is 5 there but 9 here; recipe.lr is 0.1"),
        ({"arm": "kd", "temperature": 5.0}, "temperature is 1.0 there but 5.0 here"),
        ({"arm": "kd", "teacher": "another"}, "teacher_weights is None there but 'another' here"),
    ],
)
def test_students_of_other_settings_are_not_compared(tmp_path: Path, other: dict[str, Any], said: str) -> None:
    write(tmp_path, "kd", 0, 0.5)
    write(tmp_path, seed=1, accuracy=0.6, **other)
    with pytest.raises(ValueError, match=f"do not belong together: .*{said}"):
        report(tmp_path)


def test_a_folder_without_results(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="found none"):
        report(tmp_path)
