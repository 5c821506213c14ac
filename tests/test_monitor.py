"""The monitor: what it logs, what it leaves alone, what it costs, and the trackers it logs to."""

from __future__ import annotations

import copy
import csv
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import TinyViT, cnn, spoil
from torch import Tensor, nn

import e2kd
from e2kd.bcos import AddInverse, BcosConv2d, BcosLinear
from e2kd.localization import energy_on_mask
from e2kd.monitor import TransferMonitor, to_accelerate, to_folder, to_tensorboard, to_trainer, trainer_callback
from e2kd.monitor.budget import Budget
from e2kd.pictures import displayable
from e2kd.transfer import GradCAMRegions, layer_features, scores_of, unicam, untrained

pytestmark = [pytest.mark.filterwarnings("ignore:UniCAM of .* images"), pytest.mark.usefixtures("one_thread")]
LABELS = torch.arange(16) % 3


def net(seed: int) -> nn.Sequential:
    return cnn(seed=seed).float()


def bcos_net(seed: int) -> nn.Sequential:
    """Its weights are positive, so that every class is supported somewhere."""
    torch.manual_seed(seed)
    pool = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
    made = nn.Sequential(BcosConv2d(6, 4, 3, padding=1), BcosConv2d(4, 4, 3, padding=1), *pool, BcosLinear(4, 4))
    for parameter in made.parameters():
        parameter.data.abs_()
    return made


def images(n: int = 16) -> Tensor:
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Tracker:
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.scalars: list[tuple[int, dict[str, float]]] = []
        self.pictures: list[tuple[int, dict[str, Tensor]]] = []

    def log(self, scalars: dict[str, float], step: int) -> None:
        self.scalars.append((step, scalars))

    def log_images(self, pictures: dict[str, Tensor], step: int) -> None:
        self.pictures.append((step, pictures))


def watch(tracker: Tracker, student: nn.Module | None = None, **settings: Any) -> TransferMonitor:
    settings = {"max_share": None, "layers": ["1", "3"]} | settings
    return TransferMonitor(student or net(0), net(3), (images(), LABELS), tracker.log, **settings)


class TestWhatIsLogged:
    def test_no_name_is_that_of_a_criterions_part(self) -> None:
        tracker, masks = Tracker(), torch.ones(16, 16, 16, dtype=torch.bool)
        watch(tracker, masks=masks)(0)
        assert not tracker.scalars[0][1].keys() & {f"e2kd/{name}" for name in e2kd.E2KDLoss.part_names}

    def test_scores_are_those_of_unicam(self) -> None:
        tracker = Tracker()
        watch(tracker)(0)
        ((step, scalars),) = tracker.scalars
        assert step == 0
        found = unicam(net(0), net(3), images(), LABELS, ["1", "3"])
        for name, layer in found.layers.items():
            for key, score in scores_of(layer.sums).items():
                assert scalars[f"e2kd/probe/{key}/{name}"] == pytest.approx(score.value, abs=1e-12)
            assert scalars[f"e2kd/probe/blank_distilled/{name}"] == layer.distilled.blank.double().mean().item()
        assert scalars["e2kd/probe/n"] == 16
        assert scalars["e2kd/probe/chance"] == e2kd.distance.null_spread(16)
        assert scalars["e2kd/probe/seconds"] > 0

    def test_answers_are_compared_with_the_teachers_else_the_bases(self) -> None:
        masks = torch.zeros(16, 16, 16, dtype=torch.bool)
        masks[:, 4:12, 4:12] = True
        for teacher in (None, net(4)):
            tracker = Tracker()
            watch(tracker, teacher=teacher, masks=masks)(0)
            scalars = tracker.scalars[0][1]
            theirs = e2kd.explain(teacher or net(3), images())
            mine = e2kd.explain(net(0), images(), theirs.classes)
            agreement = (mine.logits.argmax(1) == theirs.classes).double().mean().item()
            assert scalars["e2kd/probe/agreement"] == agreement
            cosines = e2kd.cosine(mine.maps, theirs.maps)
            alive = mine.maps.flatten(1).any(1) & theirs.maps.flatten(1).any(1)
            assert scalars["e2kd/probe/explanation_cosine"] == pytest.approx(cosines[alive].mean().item(), abs=1e-6)
            assert scalars["e2kd/probe/epg_student"] == pytest.approx(energy_on_mask(mine.maps, masks).nanmean().item())
            assert scalars["e2kd/probe/epg_reference"] == pytest.approx(
                energy_on_mask(theirs.maps, masks).nanmean().item()
            )

    @pytest.mark.parametrize("kinds", [("bcos", "bcos"), ("bcos", "standard"), ("standard", "bcos")])
    def test_bcos_networks_beside_their_kind_and_beside_others(self, kinds: tuple[str, str]) -> None:
        """W(x) is compared among themselves, contributions beside GradCAM; the energy is always that of places."""
        encoded = AddInverse()(images())
        given = {"bcos": (bcos_net(0), encoded), "standard": (net(3), images())}
        (student, mine), (base, theirs) = (given[kind] for kind in kinds)
        masks = torch.zeros(16, 16, 16, dtype=torch.bool)
        masks[:, 4:12, 4:12] = True
        tracker = Tracker()
        settings: dict[str, Any] = {"base_images": theirs, "masks": masks, "layers": None, "max_share": None}
        TransferMonitor(student, base, [mine, LABELS], tracker.log, **settings)(0)
        scalars = tracker.scalars[0][1]
        channels = 6 if kinds == ("bcos", "bcos") else 1
        explainer = e2kd.BcosWeights() if channels == 6 else e2kd.BcosContributions()
        explainers = [explainer if kind == "bcos" else e2kd.GradCAM() for kind in kinds]
        other = e2kd.explain(base, theirs, explainer=explainers[1])
        own = e2kd.explain(student, mine, other.classes, explainers[0])
        assert own.maps.shape[1] == other.maps.shape[1] == channels
        alike = e2kd.ExplanationLoss(reduction="none")(own.maps, other.maps)
        assert scalars["e2kd/probe/explanation_cosine"] == pytest.approx(1 - alike.mean().item(), abs=1e-5)
        whole = e2kd.BcosContributions(resolution=None)
        for name, kind, model, x in (("student", kinds[0], student, mine), ("reference", kinds[1], base, theirs)):
            explainer = explainers[0 if name == "student" else 1]
            places = whole if kind == "bcos" and channels == 6 else explainer
            maps = e2kd.explain(model, x, other.classes, places).maps
            assert scalars[f"e2kd/probe/epg_{name}"] == pytest.approx(
                energy_on_mask(maps, masks).nanmean().item(), abs=1e-5
            )

    def test_regions_and_a_control_on_request(self) -> None:
        tracker = Tracker()
        watch(tracker, regions=GradCAMRegions(), control=True)(0)
        scalars = tracker.scalars[0][1]
        found = layer_features(net(0), net(3), images(), LABELS, ["1", "3"], regions=GradCAMRegions())
        control = layer_features(net(0), untrained(net(0)), images(), LABELS, ["1", "3"])
        for name in ("1", "3"):
            assert scalars[f"e2kd/probe/regions/fss/{name}"] == pytest.approx(scores_of(found[name].sums)["fss"].value)
            assert scalars[f"e2kd/probe/regions/n/{name}"] == found[name].rows.sum()
            assert scalars[f"e2kd/probe/fss_control/{name}"] == pytest.approx(
                scores_of(control[name].sums)["fss"].value
            )

    def test_without_labels_there_is_no_relevance(self) -> None:
        tracker = Tracker()
        TransferMonitor(net(0), net(3), images(), tracker.log, layers=["3"])(0)
        assert "e2kd/probe/fss/3" in tracker.scalars[0][1]
        assert not any("rs_" in name for name in tracker.scalars[0][1])

    def test_pictures_show_images_and_maps(self) -> None:
        tracker = Tracker()
        watch(tracker, log_images=tracker.log_images, pictures=5)(0)
        ((_, pictures),) = tracker.pictures
        assert set(pictures) == {"e2kd/probe/explanations", "e2kd/probe/unicam/1", "e2kd/probe/unicam/3"}
        for picture in pictures.values():
            assert picture.dtype == torch.uint8
            assert picture.shape == (3, 3 * 128 + 2 * 2, 5 * 128 + 4 * 2)
        first = pictures["e2kd/probe/unicam/3"][:, :128, :128].float() / 255
        low, high = images()[:5].min(), images()[:5].max()
        shown = nn.functional.interpolate((images()[:1] - low) / (high - low), (128, 128), mode="bilinear")
        torch.testing.assert_close(first, shown[0], rtol=0, atol=1 / 255)

    def test_what_has_no_value_is_left_out_and_warned_of_once(self) -> None:
        tracker, same = Tracker(), net(3)
        monitor = watch(tracker, same, every=1)
        with pytest.warns(UserWarning, match="no value for rs_distilled/1, .*differs from base by nothing but scale"):
            monitor(0)
        assert "e2kd/probe/rs_distilled/3" not in tracker.scalars[0][1]
        assert math.isnan(monitor.latest["e2kd/probe/rs_distilled/3"])
        assert "nothing but scale" in monitor.reasons["rs_distilled/3"]
        assert tracker.scalars[0][1]["e2kd/probe/fss/3"] == pytest.approx(1, abs=1e-6)
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", message="UniCAM of")
            monitor(1)


class Noisy(nn.Module):
    """Draws random numbers in eval mode too, and has statistics to spoil."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Dropout()
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x + 0 * torch.rand_like(x))).relu()
        return self.head(self.drop(x.mean((2, 3))))


@pytest.mark.parametrize(("channels", "shown"), [(1, [0, 0, 0]), (2, [0, 0, 0]), (3, [0, 1, 2]), (6, [0, 1, 2])])
def test_images_are_shown_in_colour(channels: int, shown: list[int]) -> None:
    """Of images beside their inverse the first half is shown."""
    x = torch.rand(2, channels, 4, 4)
    found = displayable(x, ((0.0,) * 3, (1.0,) * 3))
    assert torch.equal(found, x[:, shown])


class TestWhatIsLeftAlone:
    def test_mode_gradients_buffers_hooks_and_random_state(self) -> None:
        torch.manual_seed(0)
        student = Noisy().train()
        student.drop.eval()
        student(images()).sum().backward()
        before = copy.deepcopy(student.state_dict())
        gradients = [p.grad.clone() for p in student.parameters()]
        monitor = watch(Tracker(), student, layers=[("norm", "3")], control=True, regions=GradCAMRegions())
        state = torch.get_rng_state()
        monitor(0)
        assert torch.equal(torch.get_rng_state(), state)
        assert [m.training for m in student.modules()] == [True, True, True, False, True]
        assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
        assert all(torch.equal(p.grad, g) for p, g in zip(student.parameters(), gradients, strict=True))
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in student.modules())

    def test_training_with_e2kd_is_the_same_with_and_without_it(self) -> None:
        def trained(watched: bool) -> dict[str, Tensor]:
            torch.manual_seed(0)
            student, teacher = Noisy(), net(4)
            criterion = e2kd.E2KDLoss(student, teacher, nn.CrossEntropyLoss())
            optimizer = torch.optim.SGD(student.parameters(), 0.1)
            monitor = watch(Tracker(), student, teacher=teacher, layers=[("norm", "3")], every=1)
            for step in range(3):
                loss = criterion(student(images()), LABELS)
                optimizer.zero_grad()
                loss.backward()
                if watched:
                    monitor(step)  # between backward and the optimizer's step
                optimizer.step()
            return student.state_dict()

        plain, watched = trained(False), trained(True)
        assert all(torch.equal(plain[name], watched[name]) for name in plain)

    @pytest.mark.parametrize("change", [None, "weights", "statistics", "signs", "order"])
    def test_fixed_models_are_asked_once_until_they_change(self, change: str | None) -> None:
        teacher, base, calls = net(4), Noisy(), list[str]()
        teacher.register_forward_hook(lambda *_: calls.append("teacher"))
        base.register_forward_hook(lambda *_: calls.append("base"))
        tracker = Tracker()
        watched = {"teacher": teacher, "layers": [("3", "norm")], "every": 1, "max_share": None}
        monitor = TransferMonitor(net(0), base, (images(), LABELS), tracker.log, **watched)
        with torch.no_grad():
            monitor(0)
            calls.clear()
            if change == "weights":
                base.conv.weight.data.add_(torch.randn(6, 3, 3, 3))  # leaves no trace but the values
            if change == "signs":
                base.conv.weight.data.neg_()
            if change == "order":
                base.conv.weight.data.copy_(base.conv.weight.flip(2).clone())
            if change == "statistics":
                base.norm.running_mean.fill_(-1)
            monitor(1)
        assert calls == ([] if change is None else ["base"])
        fresh = Tracker()
        TransferMonitor(net(0), base, (images(), LABELS), fresh.log, **watched)(0)
        assert tracker.scalars[1][1]["e2kd/probe/fss/3"] == pytest.approx(
            fresh.scalars[0][1]["e2kd/probe/fss/3"], abs=1e-12
        )
        assert (tracker.scalars[1][1]["e2kd/probe/fss/3"] == tracker.scalars[0][1]["e2kd/probe/fss/3"]) == (
            change is None
        )

    def test_a_base_whose_maps_are_large_is_read_anew(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("e2kd.monitor.probed.ROOM", 100)
        base, calls = net(3), []
        base.register_forward_hook(lambda *_: calls.append(1))
        monitor = TransferMonitor(net(0), base, images(), Tracker().log, teacher=net(4), layers=["3"], every=1)
        for step in range(3):
            monitor.measure(step)
        assert len(calls) == 3

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_a_student_of_another_precision_than_the_probe(self, dtype: torch.dtype) -> None:
        tracker = Tracker()
        watch(tracker, net(0).to(dtype)).measure(0)
        whole = Tracker()
        watch(whole).measure(0)
        for name, value in whole.scalars[0][1].items():
            assert tracker.scalars[0][1][name] == pytest.approx(value, abs=0.1) or name.endswith(("seconds", "share"))

    def test_measures_inside_of_inference_mode(self) -> None:
        tracker, model = Tracker(), net(0)
        monitor = watch(tracker)
        with torch.inference_mode():
            monitor.measure(0)
            found = e2kd.explain(model, images(), LABELS.clone())
        assert tracker.scalars[0][1]["e2kd/probe/agreement"] >= 0
        assert torch.equal(found.maps, e2kd.explain(net(0), images(), LABELS).maps)

    def test_says_why_a_student_that_is_nan_has_no_cosine_and_no_agreement(self) -> None:
        """Its argmax is class 0, which the base may say, too."""
        tracker, student = Tracker(), net(0)
        student[0].weight.data.fill_(torch.nan)
        monitor = watch(tracker, student)
        with pytest.warns(match="no value for"):
            monitor.measure(0)
        for name in ("explanation_cosine", "zero_maps"):
            assert monitor.reasons[name] == "one of the two has maps that are NaN or infinite"
        assert monitor.reasons["agreement"] == "one of the two has logits that are NaN"
        assert "e2kd/probe/agreement" not in tracker.scalars[0][1]

    def test_a_student_that_is_nan_for_one_image_has_no_energy_on_the_objects(self) -> None:
        student = net(0)
        student[0].register_forward_hook(spoil)
        monitor = watch(Tracker(), student, masks=torch.ones(16, 16, 16, dtype=torch.bool))
        with pytest.warns(match="no value for"):
            monitor.measure(0)
        assert math.isnan(monitor.latest["e2kd/probe/epg_student"])
        assert monitor.reasons["epg_student"] == "its maps are NaN or infinite"
        assert monitor.latest["e2kd/probe/epg_reference"] == pytest.approx(1)

    def test_works_around_a_compiled_student(self) -> None:
        student = torch.compile(net(0), backend="eager")
        tracker = Tracker()
        watch(tracker, student)(0)
        plain = Tracker()
        watch(plain, net(0))(0)
        assert tracker.scalars[0][1]["e2kd/probe/fss/3"] == plain.scalars[0][1]["e2kd/probe/fss/3"]


class TestBudget:
    def test_steps(self) -> None:
        tracker = Tracker()
        monitor = watch(tracker, every=3)
        for step in range(1, 9):
            monitor(step)
        assert [step for step, _ in tracker.scalars] == [1, 3, 6]
        monitor(0)  # another run
        assert tracker.scalars[-1][0] == 0

    def test_a_resumed_run_probes_where_another_would(self) -> None:
        tracker = Tracker()
        monitor = watch(tracker, every=5)
        for step in range(13, 27):
            monitor(step)
        assert [step for step, _ in tracker.scalars] == [13, 15, 20, 25]

    def test_steps_that_begin_anew_in_every_epoch(self) -> None:
        tracker = Tracker()
        monitor = watch(tracker, every=5)
        for _ in range(3):
            for step in range(3):
                monitor(step)
        assert [step for step, _ in tracker.scalars] == [
            0,
            2,
            0,
        ]  # first, every fifth call, and what looks like a new run

    def test_a_probe_that_takes_too_long_is_cut_short(self) -> None:
        tracker = Tracker()
        monitor = watch(tracker, regions=GradCAMRegions(), max_seconds=1e-9)
        with pytest.warns(UserWarning, match="no value for UniCAM, regions: skipped after max_seconds=1e-09"):
            monitor(0)
        scalars = tracker.scalars[0][1]
        assert "e2kd/probe/agreement" in scalars
        assert "e2kd/probe/fss/3" not in scalars

    def test_probes_come_later_where_they_would_cost_more_than_their_share(self) -> None:
        now = [0.0]
        budget, probed = Budget(every=10, max_share=0.02, clock=lambda: now[0]), []
        for step in range(2000):
            now[0] += 1.0
            if budget.due(step):
                budget.begin(step)
                now[0] += 2.0  # as long as two steps
                budget.end()
                probed.append(step)
                assert step == 0 or budget.share <= 0.0201
        assert probed[0] == 0
        assert len(probed) == pytest.approx(2000 * 0.02 / 2, abs=1)

    def test_settings_that_make_no_sense(self) -> None:
        for settings in ({"every": 0}, {"max_seconds": 0.0}, {"max_share": -1.0}):
            with pytest.raises(ValueError, match="Expected every >= 1"):
                watch(Tracker(), **settings)


class TestBadInput:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"masks": torch.ones(15, 16, 16)}, "Expected masks of the probe's 16 images"),
            ({"teacher_images": torch.ones(2, 3, 8, 8)}, "Expected teacher_images of the probe's 16"),
            ({"embeddings": torch.ones(2, 5)}, "embeddings of 2 classes"),
        ],
    )
    def test_that_does_not_fit_is_found_before_training(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            watch(Tracker(), **settings)

    @pytest.mark.parametrize(
        ("probe", "said"),
        [
            ({"image": images(), "label": LABELS}, "a dict of 'image', 'label'"),
            ((images(),), r"a tuple of a tensor \[16, 3, 16, 16\]"),
            ((images(), LABELS.tolist()), "a tuple of a tensor .*, list"),
            ((images().numpy(), LABELS), "a tuple of ndarray"),
            (images()[0], r"a tensor \[3, 16, 16\]"),
            ((images()[:0], LABELS[:0]), r"a tuple of a tensor \[0, 3"),
        ],
    )
    def test_a_probe_that_is_no_images_and_labels(self, probe: Any, said: str) -> None:
        with pytest.raises(ValueError, match=rf"Expected the probe as images .* but got {said}.*pass its two tensors"):
            TransferMonitor(net(0), net(3), probe, Tracker().log)

    @pytest.mark.parametrize("wrong", [torch.ones(16, 1, 16, 16), [[[0, 0, 4, 4]]] * 16])
    def test_masks_of_another_form(self, wrong: Any) -> None:
        with pytest.raises(ValueError, match=r"Expected masks as a tensor \[n, H, W\], but got (a tensor|list)"):
            watch(Tracker(), masks=wrong)

    def test_models_of_other_classes(self) -> None:
        with pytest.raises(ValueError, match="of the same classes"):
            watch(Tracker(), teacher=cnn(classes=7).float())(0)

    def test_models_of_other_sizes(self) -> None:
        large = nn.functional.interpolate(images(), (32, 32))
        with pytest.raises(ValueError, match="base TinyViT can't take images"):
            TransferMonitor(net(0), TinyViT().float(), (large, LABELS), Tracker().log, teacher=net(3))(0)
        tracker = Tracker()
        TransferMonitor(
            net(0), TinyViT().float(), (large, LABELS), tracker.log, base_images=images(), layers=[("3", "blocks.0")]
        )(0)
        assert "e2kd/probe/fss/3" in tracker.scalars[0][1]


class TestTrackers:
    def test_tensorboard(self, tmp_path: Path) -> None:
        pytest.importorskip("tensorboard")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(tmp_path))
        TransferMonitor(net(0), net(3), (images(), LABELS), *to_tensorboard(writer), layers=["3"])(7)
        writer.close()
        events = EventAccumulator(str(tmp_path)).Reload()
        (event,) = events.Scalars("e2kd/probe/fss/3")
        assert event.step == 7
        assert "e2kd/probe/unicam/3" in events.Tags()["images"]

    def test_accelerate_trackers_with_and_without_images(self) -> None:
        from accelerate.tracking import GeneralTracker

        class Plain(GeneralTracker):
            name, requires_logging_directory, tracker = "plain", False, None

            def __init__(self) -> None:
                super().__init__()
                self.seen: list[Any] = []

            def store_init_configuration(self, values: Any) -> None: ...

            def log(self, values: Any, step: int | None, **_: Any) -> None:
                self.seen.append((step, values))

        class Pictures(Plain):
            name = "pictures"

            def log_images(self, values: Any, step: int | None = None, **_: Any) -> None:
                self.seen.append((step, values))

        class TensorBoard(Pictures):
            name = "tensorboard"

        class Aim(Pictures):
            name = "aim"

        class Accelerator:
            trackers = (Plain(), Pictures(), TensorBoard(), Aim())

            def log(self, values: Any, step: int) -> None:
                for tracker in self.trackers:
                    tracker.log(values, step)

        accelerator = Accelerator()
        TransferMonitor(net(0), net(3), (images(), LABELS), *to_accelerate(accelerator), layers=["3"])(5)
        plain, pictures, board, aim = (tracker.seen for tracker in accelerator.trackers)
        assert len(plain) == 1
        assert plain[0][0] == 5
        ((image,), batch, alone) = (seen[1][1]["e2kd/probe/unicam/3"] for seen in (pictures, board, aim))
        assert image.shape == (388, 1038, 3)
        assert batch.shape == (1, 3, 388, 1038)
        assert alone.shape == (388, 1038, 3)

    def test_files(self, tmp_path: Path) -> None:
        monitor = TransferMonitor(
            net(0), net(3), (images(), LABELS), *to_folder(tmp_path), layers=["3"], every=1, max_share=None
        )
        monitor(0)
        monitor(1)
        rows = list(csv.DictReader((tmp_path / "scalars.csv").open()))
        assert [row["step"] for row in rows if row["name"] == "e2kd/probe/n"] == ["0", "1"]
        assert {path.name for path in tmp_path.glob("*.png")} == {
            f"e2kd-probe-{name}-0000000{step}.png" for name in ("explanations", "unicam-3") for step in (0, 1)
        }

    def test_hugging_face_trainer(self, tmp_path: Path) -> None:
        transformers = pytest.importorskip("transformers")
        student = net(0)

        def loss(outputs: Any, labels: Tensor, **_: Any) -> Tensor:
            return nn.functional.cross_entropy(outputs[1], labels)

        class Wrapped(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = student

            def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
                logits = self.inner(pixel_values)
                return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

        data = [{"pixel_values": image, "labels": label} for image, label in zip(images(), LABELS, strict=True)]
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=3, report_to=[], use_cpu=True, disable_tqdm=True, per_device_train_batch_size=8,
            logging_steps=1,
        )  # fmt: skip
        trainer = transformers.Trainer(Wrapped(), arguments, train_dataset=data)
        monitor = TransferMonitor(
            student, net(3), (images(), LABELS), *to_trainer(trainer), layers=["3"], every=2, max_share=None
        )
        trainer.add_callback(trainer_callback(monitor))
        trainer.train()
        logged = [
            (row["step"], row["e2kd/probe/fss/3"]) for row in trainer.state.log_history if "e2kd/probe/fss/3" in row
        ]
        assert [step for step, _ in logged] == [1, 2]
        assert [row["step"] for row in trainer.state.log_history if "loss" in row] == [1, 2, 3]
        assert logged[0] != logged[1]

    def test_timms_summary_has_the_same_columns_in_every_epoch(self, tmp_path: Path) -> None:
        """It writes a header once and then values alone: also where one is NaN, or a probe was cut short."""
        utils = pytest.importorskip("timm.utils")
        monitor, file = watch(Tracker(), net(3), every=1), tmp_path / "summary.csv"
        for epoch in range(3):
            if epoch:
                nn.init.normal_(monitor.student[2].weight)
            monitor.budget.max_seconds = 1e-9 if epoch == 2 else None
            with pytest.warns(UserWarning, match="nothing but scale|skipped") if epoch != 1 else nullcontext():
                monitor(epoch)
            utils.update_summary(epoch, {"loss": 1.0} | monitor.latest, None, file, write_header=epoch == 0)
        same, changed, cut = csv.DictReader(file.open())
        assert float(same["train_e2kd/probe/fss/3"]) == pytest.approx(1)
        assert same["train_e2kd/probe/rs_distilled/3"] == "nan" != changed["train_e2kd/probe/rs_distilled/3"]
        assert cut["train_e2kd/probe/fss/3"] == "nan"
        assert float(same["train_e2kd/probe/agreement"]) == 1
        assert float(cut["train_e2kd/probe/seconds"]) > 0
