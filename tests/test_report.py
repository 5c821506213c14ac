"""The report: its numbers against the library's, its page parsed, its words, and the command from folders to HTML."""

from __future__ import annotations

import base64
import json
import math
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from nets import SharedActivation, cnn, spoil
from torch import Tensor, nn

import e2kd
from e2kd.bcos import AddInverse, BcosConv2d, BcosLinear
from e2kd.commands.models import make_model
from e2kd.distance import Score
from e2kd.localization import energy_on_mask
from e2kd.report import page, wording
from e2kd.report.measuring import LayerScores, Measured, Pair, Pictures, Subject, measure
from e2kd.report.stages import stages
from e2kd.transfer import GradCAMRegions, layer_features, scores_of, stability, unicam
from e2kd.transfer.readings import read

pytestmark = [pytest.mark.filterwarnings("ignore:UniCAM of .* images"), pytest.mark.usefixtures("one_thread")]
LABELS = torch.arange(24) % 3
NASTY = '<script>alert("x")</script> & $x_1$'


def net(seed: int, classes: int = 3) -> nn.Sequential:
    return cnn(classes=classes, seed=seed).float()


def torchvision_net(seed: int) -> nn.Module:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(seed)
    model: nn.Module = torchvision.models.resnet18(num_classes=3)
    return model


def images() -> Tensor:
    return torch.rand(24, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def subject(role: str, seed: int, name: str = "net", classes: int = 3) -> Subject:
    return Subject(role, name, net(seed, classes).eval(), images(), ["1", "3"])


def masks() -> Tensor:
    found = torch.zeros(24, 16, 16, dtype=torch.bool)
    found[:, 4:12, 4:12] = True
    return found


@pytest.fixture(scope="module")
def measured() -> Measured:
    pictures = Pictures(images(), LABELS, ("cat", "dog", NASTY), masks=masks())
    subjects = [subject("student", 0, NASTY), subject("base", 3), subject("teacher", 4)]
    return measure(subjects, pictures, regions=GradCAMRegions(), keep=40)


def test_bcos_networks_beside_others() -> None:
    """Contributions beside GradCAM; energy and overlap are those of places, not of W(x)."""
    torch.manual_seed(0)
    pool = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
    student = nn.Sequential(BcosConv2d(6, 4, 3, padding=1), BcosConv2d(4, 4, 3, padding=1), *pool, BcosLinear(4, 3))
    for parameter in student.parameters():
        parameter.data.abs_()  # so that every class is supported somewhere
    encoded = AddInverse()(images())
    subjects = [Subject("student", "B-cos", student.eval(), encoded, ["0", "1"]), subject("base", 3)]
    found = measure(subjects, Pictures(images(), LABELS, ("a", "b", "c"), masks=masks()))
    other = e2kd.explain(subjects[1].model, images())
    own = e2kd.explain(student, encoded, other.classes, e2kd.BcosContributions())
    assert found.pairs[0].cosine == pytest.approx(e2kd.cosine(own.maps, other.maps).mean().item(), abs=1e-5)
    places = e2kd.explain(student, encoded, explainer=e2kd.BcosContributions(resolution=None)).maps
    assert found.answers["student"].epg == pytest.approx(energy_on_mask(places, masks()).mean().item(), abs=1e-5)


class Page(HTMLParser):
    """Collects what a browser would see: texts, tables, images, and tags that were not closed."""

    VOID = ("meta", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.texts: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert not any(name.startswith("on") for name, _ in attrs)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.texts.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


class TestNumbers:
    def test_are_those_of_the_library(self, measured: Measured) -> None:
        assert [pair.roles for pair in measured.pairs] == [
            ("student", "base"), ("student", "teacher"), ("base", "teacher"),
        ]  # fmt: skip
        expected = unicam(net(0), net(3), images(), LABELS, ["1", "3"])
        region = layer_features(
            net(0), net(3), images(), LABELS, ["1", "3"], regions=GradCAMRegions(), keep=40, batch_size=32
        )
        steady = stability(*(read(net(s), images(), ["1", "3"]) for s in (0, 3)), LABELS)
        for layer, (name, transfer) in zip(measured.pairs[0].layers, expected.layers.items(), strict=True):
            for key, score in scores_of(transfer.sums).items():
                assert layer.scores[key].value == pytest.approx(score.value, abs=1e-12)
                assert layer.regions[key].value == pytest.approx(scores_of(region[name].sums)[key].value, abs=1e-9)
            assert -1 <= layer.scores["fss_control"].value <= 1
            assert layer.blank[0] == transfer.distilled.blank.double().mean().item()
            assert layer.steady[0] == pytest.approx(steady[name].distilled.nanmean().item(), nan_ok=True)

    def test_answers_and_explanations(self, measured: Measured) -> None:
        found = e2kd.explain(net(0).eval(), images())
        answer = measured.answers["student"]
        assert answer.accuracy == (found.logits.argmax(1) == LABELS).double().mean().item()
        energy = e2kd.localization.energy_on_mask(found.maps, masks())
        assert answer.epg == pytest.approx(energy.double().nanmean().item())
        assert 0 <= answer.iou <= 1
        other = e2kd.explain(net(3).eval(), images())
        assert measured.pairs[0].agreement == (found.classes == other.classes).double().mean().item()

    def test_networks_of_other_classes_are_not_compared_by_their_answers(self) -> None:
        found = measure([subject("student", 0), subject("base", 3, classes=5)], Pictures(images(), LABELS, ("a",) * 3))
        assert math.isnan(found.pairs[0].agreement)
        assert math.isnan(found.answers["base"].accuracy)
        assert "3 classes apart and the base 5" in found.notes[0]
        assert math.isfinite(found.pairs[0].layers[0].scores["fss"].value)

    def test_a_network_that_is_nan_for_one_image_has_no_energy_on_the_objects(self) -> None:
        broken = subject("student", 0)
        next(iter(broken.model.children())).register_forward_hook(spoil)
        found = measure([broken, subject("base", 3)], Pictures(images(), LABELS, ("a", "b", "c"), masks=masks()))
        assert math.isnan(found.answers["student"].epg)
        assert math.isnan(found.answers["student"].iou)
        assert math.isfinite(found.answers["base"].epg)

    def test_a_network_that_is_nan_has_no_accuracy_and_no_agreement(self) -> None:
        """Its argmax is class 0, which is right for a third of the images."""
        broken = subject("student", 0)
        next(broken.model.parameters()).data.fill_(torch.nan)
        found = measure([broken, subject("base", 3)], Pictures(images(), LABELS, ("a", "b", "c")))
        assert math.isnan(found.answers["student"].accuracy)
        assert math.isnan(found.answers["student"].zero_maps)
        assert math.isnan(found.pairs[0].agreement)
        assert "The student's logits are NaN for 24 of 24 images" in found.notes[0]
        assert math.isfinite(found.answers["base"].accuracy)


@pytest.mark.parametrize(
    ("n", "labels", "reason"),
    [
        (3, torch.arange(3), "3 images are too few"),
        (12, torch.zeros(12, dtype=torch.long), "labels is the same for every image"),
    ],
)
def test_degenerate_images_give_a_page_of_reasons(n: int, labels: Tensor, reason: str, tmp_path: Path) -> None:
    subjects = [
        Subject(role, "net", net(s).eval(), images()[:n], ["1", "3"]) for role, s in (("student", 0), ("base", 3))
    ]
    found = measure(subjects, Pictures(images()[:n], labels, ("a", "b", "c")), regions=GradCAMRegions())
    texts = Page(page.write(found, tmp_path).read_text(encoding="utf-8")).texts
    assert any(f"There is no rs_student: {reason}" in text for text in texts)
    assert not any("stands out from chance" in text for text in texts)
    assert any("by chance; the ± is" in text for text in texts) == (n > 3)
    assert not any("nan" in text for text in texts)
    json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))


class TestPage:
    def test_stands_alone_and_escapes_everything(self, measured: Measured, tmp_path: Path) -> None:
        path = page.write(measured, tmp_path, f"e2kd report --out {NASTY}")
        text = path.read_text(encoding="utf-8")
        seen = Page(text)
        assert "script" not in seen.tags
        assert text.count(NASTY) == 0
        assert sum(NASTY in part for part in seen.texts) >= 3  # heading, table, command: as text
        assert seen.sources
        for source in seen.sources:
            assert source.startswith("data:image/png;base64,")
            assert base64.b64decode(source.split(",")[1])[:4] == b"\x89PNG"
        assert {p.name for p in tmp_path.iterdir()} == {
            "report.html", "report.json", "fss.png", "rs.png", "unicam-1.png", "unicam-2.png",
        }  # fmt: skip

    def test_tables_show_the_numbers_with_n_chance_and_flags(self, measured: Measured) -> None:
        rows = Page(page.render(measured, page._figures(measured))).rows
        layer = measured.pairs[0].layers[1]
        row = next(row for row in rows if row[0] == "3")
        fss = layer.scores["fss"]
        assert row[2] == f"{fss.value:.2f} ± {fss.error:.2f}"
        assert row[8:10] == ["24", f"{fss.chance:.3f}"]
        assert row[10] == wording.flags(layer)
        by_own_map = rows[rows.index(row) + 1]
        assert by_own_map[1] == "40 % by own map"
        assert by_own_map[8] == str(layer.regions["fss"].n)

    def test_numbers_are_json_without_nan(self, measured: Measured, tmp_path: Path) -> None:
        page.write(measured, tmp_path)
        found = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
        assert found["pairs"][0]["layers"][0]["scores"]["fss"]["n"] == 24
        json.dumps(found, allow_nan=False)

    def test_without_labels_there_is_no_relevance(self, tmp_path: Path) -> None:
        found = measure([subject("student", 0), subject("base", 3)], Pictures(images()))
        text = page.write(found, tmp_path).read_text(encoding="utf-8")
        assert not (tmp_path / "rs.png").exists()
        assert "relevant to the labels" not in text


def score(value: float, error: float = 0.01, reason: str = "") -> Score:
    return Score(value, error, 0.02, 64, 1, 0, reason)


def pair(**scores: Score) -> Pair:
    made = LayerScores(("layer1", "layer1"), scores, {}, (0.0, 0.0), (0.9, 0.9))
    return Pair(("student", "base"), 0.5, 0.25, [made], unicam(net(0), net(3), images()))


class TestWords:
    def say(self, **scores: Score) -> str:
        subjects = [subject("student", 0), subject("base", 3)]
        return " ".join(wording.findings(Measured(subjects, Pictures(images()), {}, [pair(**scores)], 50)))

    def test_speak_of_what_is_above_chance_only(self) -> None:
        fss, control = score(0.9), score(0.3)
        clear = self.say(fss=fss, fss_control=control, rs_distilled=score(0.3), rs_residual=score(0.05))
        assert "The student has features relevant to the labels that the base lacks at layer1" in clear
        assert "Nothing relevant to the labels that the base has beyond the student stands out" in clear
        assert "untrained network has in common" not in clear
        assert "Two networks of one and the same training" in clear
        assert wording.SEEDS not in self.say(fss=fss, fss_control=control, rs_distilled=score(0.05))

    def test_a_similarity_that_needs_no_training_is_called_so(self) -> None:
        assert "At layer1 that is no more than an untrained" in self.say(fss=score(0.9), fss_control=score(0.88))

    def test_say_why_there_is_no_number(self) -> None:
        said = self.say(fss=score(math.nan, reason="base is the same for every image"), fss_control=score(0.3))
        assert "There is no fss: base is the same for every image." in said

    def test_limits_name_few_images_two_classes_and_blank_maps(self, measured: Measured) -> None:
        said = " ".join(wording.limits(measured))
        assert "24 images are few" in said
        assert ("Blank maps are no error" in said) == any(max(x.blank) > 0.25 for x in measured.pairs[0].layers)
        two = Measured(measured.subjects, Pictures(images(), LABELS % 2, ("a", "b")), {}, measured.pairs, 50)
        assert "With two classes" in " ".join(wording.limits(two))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos of two classes with masks, and checkpoints of three small networks."""
    timm = pytest.importorskip("timm")
    from PIL import Image
    from safetensors.torch import save_file

    root = tmp_path_factory.mktemp("photos")
    generator = torch.Generator().manual_seed(0)
    for label in ("cat", "dog"):
        for kind in ("images", "masks"):
            (root / kind / label).mkdir(parents=True)
        for k in range(6):
            pixels = torch.randint(256, (40, 50, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(root / "images" / label / f"{k}.jpg")
            object_ = torch.full((40, 50), 2, dtype=torch.uint8)
            object_[10:30, 10:30] = 1
            Image.fromarray(object_.numpy()).save(root / "masks" / label / f"{k}.png")
    for seed, name in enumerate(("student", "base", "teacher")):
        torch.manual_seed(seed)
        save_file(timm.create_model("resnet10t", num_classes=2).state_dict(), root / f"{name}.safetensors")
    return root


class TestCommand:
    def arguments(self, folder: Path, out: Path, *more: str) -> list[str]:
        models = [
            part
            for role in ("student", "base")
            for part in (f"--{role}", "resnet10t", f"--{role}-checkpoint", str(folder / f"{role}.safetensors"))
        ]
        sizes = ["--student-size", "64", "--base-size", "64"]
        return ["report", *models, *sizes, "--images", str(folder / "images"), "--out", str(out), *more]

    def test_from_folders_to_a_page(self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        from e2kd.cli import main

        masked = ("--masks", str(folder / "masks"), "--mask-value", "1", "--count", "12", "--regions", "gradcam")
        assert main(self.arguments(folder, tmp_path, *masked)) == 0
        assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")
        found = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
        assert found["n"] == 12
        assert found["networks"][0]["layers"] == ["layer1", "layer2", "layer3", "layer4"]
        assert 0 < found["networks"][0]["epg"] < 1
        assert found["pairs"][0]["layers"][3]["scores"]["rs_student"]["n"] == 12

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (["--masks", "images"], "Expected the mask of"),
            (["--encoder", "nowhere/nothing"], "neither a folder nor in the hub's cache"),
            (["--student-layers", "nowhere"], "no layer named 'nowhere'"),
            (["--student-layers", "layer1", "layer1"], "--student-layers to name every layer once"),
            (["--student", "resnet10tt"], "knows no model 'resnet10tt'. Did you mean resnet10t"),
            (["--student", "resnet14t"], "student.safetensors holds other weights than resnet14t has: "),
        ],
    )
    def test_bad_input_is_said_in_a_sentence(
        self,
        folder: Path,
        tmp_path: Path,
        change: list[str],
        message: str,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        import huggingface_hub as hub

        from e2kd.cli import main

        def offline(*_: object, **__: object) -> None:
            raise hub.errors.LocalEntryNotFoundError("offline")

        monkeypatch.setattr(hub, "snapshot_download", offline)
        if change[0] == "--masks":
            change = ["--masks", str(tmp_path)]
        assert main(self.arguments(folder, tmp_path / "out", "--count", "8", "--regions", "none", *change)) == 2
        assert message in capsys.readouterr().err

    def test_a_network_that_a_function_of_ones_own_makes(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Found in the working folder, and shown under the function's name."""
        from e2kd.cli import main

        (tmp_path / "own_networks.py").write_text(
            "import timm\n"
            "def small(num_classes): return timm.create_model('resnet10t', num_classes=num_classes)\n"
            "def nothing(num_classes): return None\n"
        )
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.path", list(sys.path))
        arguments = self.arguments(folder, tmp_path, "--count", "4", "--regions", "none")
        arguments[arguments.index("resnet10t")] = "own_networks:small"
        assert main(arguments) == 0
        found = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
        assert found["networks"][0]["name"] == "small (student.safetensors)"
        for name, message in {
            "own_networks:nothing": "returned NoneType",
            "own_networks:missing": "no attribute 'missing'",
            "no_such_module:small": "No module named",
        }.items():
            with pytest.raises(ValueError, match=message):
                make_model(name, 2, None, pretrained=False)

    def test_a_network_that_does_not_say_how_it_expects_images(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Known of it is what the command line says; its numbers are those of a network that says it itself."""
        from e2kd.cli import main

        (tmp_path / "silent_networks.py").write_text(
            "import timm\n"
            "def small(num_classes):\n"
            "    model = timm.create_model('resnet10t', num_classes=num_classes)\n"
            "    del model.pretrained_cfg, model.default_cfg\n"
            "    return model\n"
        )
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.path", list(sys.path))
        arguments = self.arguments(folder, tmp_path / "known", "--count", "8", "--regions", "none")
        assert main(arguments) == 0
        arguments[arguments.index("resnet10t")] = "silent_networks:small"
        arguments[arguments.index(str(tmp_path / "known"))] = str(tmp_path / "said")
        assert main(arguments) == 2
        assert "Pass --mean and --std" in capsys.readouterr().err
        cfg = make_model("resnet10t", 2, None, pretrained=False).pretrained_cfg
        said = [word for name in ("mean", "std") for word in (f"--{name}", *map(str, cfg[name]))]
        assert main([*arguments, *said]) == 0
        known, found = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("known", "said"))
        assert found["networks"][0]["accuracy"] == known["networks"][0]["accuracy"]
        assert found["pairs"] == known["pairs"]

    @pytest.mark.parametrize(
        ("name", "more", "message"),
        [
            ("grey", [], "The base Sequential can't take images [8, 3, 64, 64]: "),
            ("grey", ["--student-layers", "layer1", "--base-layers", "0"], "The base Sequential can't take images"),
            (
                "still",
                [],
                "No stages were found in Still that end in a module of their own. Name layers through --base-layers",
            ),
        ],
    )
    def test_networks_that_cannot_be_reported_on(
        self,
        folder: Path,
        tmp_path: Path,
        name: str,
        more: list[str],
        message: str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        """One for grey images, and one without parameters."""
        from e2kd.cli import main

        (tmp_path / "odd_networks.py").write_text(
            "from torch import nn\n"
            "class Still(nn.Module):\n"
            "    def forward(self, x): return x.mean((2, 3))[:, :2]\n"
            "def still(num_classes=2): return Still()\n"
            "def grey(num_classes=2):\n"
            "    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))\n"
        )
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.path", list(sys.path))
        arguments = self.arguments(folder, tmp_path / "out", "--count", "8", "--mean", "0", "--std", "1")
        at = arguments.index("--base")
        arguments[at : at + 4] = ["--base", f"odd_networks:{name}"]
        assert main(arguments) == 2
        assert message in capsys.readouterr().err

    def test_a_photo_of_16_bits_is_named(
        self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        import numpy as np
        from PIL import Image

        from e2kd.cli import main

        Image.fromarray(np.full((40, 50), 40000, np.uint16)).save(tmp_path / "deep.png")
        arguments = self.arguments(folder, tmp_path / "out", "--num-classes", "2")
        arguments[arguments.index(str(folder / "images"))] = str(tmp_path)
        assert main(arguments) == 2
        assert f"{tmp_path / 'deep.png'} could not be read: Expected PIL images of 8 bits" in capsys.readouterr().err

    def test_bcos_networks_by_name(self, folder: Path, tmp_path: Path) -> None:
        from e2kd.cli import main

        torch.save(make_model("bcos.resnet20", 2, None, pretrained=False).state_dict(), tmp_path / "bcos.pth")
        pair = [
            word
            for role in ("--student", "--base")
            for word in (role, "bcos.resnet20", f"{role}-checkpoint", str(tmp_path / "bcos.pth"))
        ]
        sizes = ["--student-size", "32", "--base-size", "32", "--student-layers", "layer2", "--base-layers", "layer2"]
        images = ["--images", str(folder / "images"), "--count", "8"]
        masks = ["--masks", str(folder / "masks"), "--mask-value", "1"]
        assert main(["report", *pair, *sizes, *images, *masks, "--out", str(tmp_path)]) == 0
        found = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
        assert found["networks"][0]["layers"] == ["network.layer2"]
        assert 0 < found["networks"][0]["epg"] < 1

    @pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"PK\x03\x04cut", b"\x80\x02X\x01"])
    @pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
    def test_a_file_that_is_no_checkpoint(
        self, folder: Path, tmp_path: Path, content: bytes, suffix: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        from e2kd.cli import main

        path = tmp_path / f"broken{suffix}"
        path.write_bytes(content)
        assert main([*self.arguments(folder, tmp_path), "--student-checkpoint", str(path)]) == 2
        assert f"{path} could not be read as a state_dict" in capsys.readouterr().err

    def test_a_whole_network_in_a_file_is_not_unpickled(
        self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        from e2kd.cli import main

        path = tmp_path / "whole.pth"
        torch.save(nn.Linear(2, 2), path)
        assert main([*self.arguments(folder, tmp_path), "--student-checkpoint", str(path)]) == 2
        assert "of tensors and plain values alone" in capsys.readouterr().err

    @pytest.mark.parametrize("said", [["--device", "gpu"], ["--count", "0"], ["--batch-size", "-1"]])
    def test_words_that_are_no_device_or_number(
        self, folder: Path, tmp_path: Path, said: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        from e2kd.cli import main

        with pytest.raises(SystemExit):
            main([*self.arguments(folder, tmp_path), *said])
        assert f"argument {said[0]}: expected" in capsys.readouterr().err

    def test_masks_in_one_folder_are_not_taken_twice(
        self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The photos of both classes have the same names."""
        from e2kd.cli import main

        arguments = self.arguments(folder, tmp_path, "--masks", str(folder / "masks" / "cat"), "--count", "4")
        assert main(arguments) == 2
        assert "Several photos are called 0" in capsys.readouterr().err

    @pytest.mark.parametrize("kind", ["images", "masks"])
    def test_a_photo_or_mask_that_was_cut_short_is_named(
        self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
    ) -> None:
        from e2kd.cli import main

        pictures = shutil.copytree(folder / kind, tmp_path / kind)
        cut = next((pictures / "dog").glob("3.*"))
        cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
        assert main([*self.arguments(folder, tmp_path / "out", "--count", "12"), f"--{kind}", str(pictures)]) == 2
        assert str(cut) in capsys.readouterr().err

    def test_one_network_is_not_enough(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        from e2kd.cli import main

        assert main(["report", "--student", "resnet10t", "--images", str(folder), "--out", "out"]) == 2
        assert "two or three networks" in capsys.readouterr().err

    def test_stages_of_a_transformer_are_spread_evenly(self) -> None:
        timm = pytest.importorskip("timm")
        vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=8)
        assert stages(vit, torch.rand(2, 3, 32, 32)) == ["blocks.1", "blocks.3", "blocks.5", "blocks.7"]

    @pytest.mark.parametrize(
        ("name", "expected"),
        [("own", ["1", "3"]), ("torchvision", ["layer1", "layer2", "layer3", "layer4"]), ("shared", None)],
    )
    def test_stages_of_networks_that_do_not_tell_them(self, name: str, expected: list[str] | None) -> None:
        """They are found, and read as they were found; not where one module ends several and another layer too."""
        models = {"own": net, "torchvision": torchvision_net, "shared": SharedActivation}
        model = models[name](seed=0).float().eval()
        if expected is None:
            with pytest.raises(e2kd.UnsupportedModel, match=r"No stages .* --layers"):
                stages(model, images())
            return
        pictures = torch.rand(24, 3, 64, 64) if name == "torchvision" else images()
        assert stages(model, pictures) == expected
        assert [layer.maps.shape[0] for layer in read(model, pictures, expected).layers] == [24] * len(expected)
