"""Words on a command line that can't be right: said at once and in a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from e2kd.cli import main

PAIR = ["--student", "test_resnet", "--teacher", "test_resnet"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes with two photos each."""
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("timm")
    made = tmp_path_factory.mktemp("photos")
    for name in ("cat", "dog"):
        (made / name).mkdir()
        for n in range(2):
            image.new("RGB", (32, 32), (40 * n, 80, 120)).save(made / name / f"{n}.png")
    return made


def commands(folder: Path, out: Path) -> dict[str, list[str]]:
    return {
        "check": ["check", *PAIR],
        "freeze": ["freeze", "--teacher", "test_resnet", "--data", str(folder), "--out", str(out)],
        "report": ["report", *PAIR, "--images", str(folder), "--out", str(out)],
    }


@pytest.mark.parametrize(
    ("command", "option", "value", "sentence"),
    [
        ("check", "--size", "-3", "a whole number from 1"),
        ("check", "--size", "0", "a whole number from 1"),
        ("check", "--num-classes", "-3", "a whole number from 1"),
        ("check", "--max-classes", "0", "a whole number from 1"),
        ("freeze", "--num-classes", "0", "a whole number from 1"),
        ("freeze", "--teacher-size", "0", "a whole number from 1"),
        ("freeze", "--shard-rows", "0", "a whole number from 1"),
        ("freeze", "--view", "0", "a whole number from 1"),
        ("freeze", "--top", "0", "a whole number from 1"),
        ("report", "--student-size", "0", "a whole number from 1"),
        ("report", "--num-classes", "-3", "a whole number from 1"),
        ("report", "--keep", "150", "a percentage from 0 to 100"),
        ("report", "--keep", "nan", "a percentage from 0 to 100"),
        ("report", "--keep", "half", "a percentage from 0 to 100"),
    ],
)
def test_numbers_out_of_range(
    command: str, option: str, value: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([*commands(tmp_path, tmp_path)[command], option, value])
    assert f"argument {option}: expected {sentence}, but got {value!r}" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["freeze", "report"])
def test_random_networks_do_not_pass_for_pretrained_ones(
    command: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["bcos.resnet20" if word == "test_resnet" else word for word in commands(folder, tmp_path / "x")[command]]
    assert main([*words, "--num-classes", "2", "--device", "cpu"]) == 2
    assert "bcos.resnet20 has no pretrained weights: pass a state_dict" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cuda:63", "mps:63"])
def test_a_device_that_is_not_there(
    device: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], checkpoint: list[str]
) -> None:
    words = [*commands(folder, tmp_path / "x")["freeze"], *checkpoint, "--device", device]
    assert main(words) == 2
    assert f"but --device {device} can't be used" in capsys.readouterr().err


@pytest.fixture
def checkpoint(tmp_path: Path) -> list[str]:
    import timm

    torch.save(timm.create_model("test_resnet", num_classes=2).state_dict(), tmp_path / "teacher.pth")
    return ["--teacher-checkpoint", str(tmp_path / "teacher.pth")]


def test_means_of_other_images(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "silent.py").write_text(
        "from torch import nn\n"
        "def small(num_classes):\n"
        "    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes)\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), *head)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    words = ["check", "--student", "silent:small", "--teacher", "silent:small", "--num-classes", "2"]
    said = ["--images", str(folder), "--size", "32", "--mean", "0", "0", "--std", "1", "1"]
    assert main([*words, *said]) == 2
    assert "for each of the 3 colours, but got 2 and 2" in capsys.readouterr().err


def test_a_report_that_can_not_be_written_is_not_measured(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("e2kd.commands.reporting.make_model", None)  # would be called first
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "inside"):
        assert main(commands(folder, out)["report"]) == 2
        assert f"Expected a folder that can be written to, but {out} can't be one" in capsys.readouterr().err
