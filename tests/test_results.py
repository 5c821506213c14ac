"""Committed results: complete, and the README says what they say."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
import torch

from benchmarks import (
    beside,
    cells,
    hosts,
    limited,
    peers,
    right_reasons,
    shift_curves,
    sparing,
    tables,
    transfer_studies,
)
from benchmarks.paired import differences, values

FOLDER = Path(__file__).parent.parent / "benchmarks" / "results"
RESULTS = sorted(path for path in FOLDER.glob("*.json") if path.stem != "demo_tuning")  # a record, not a result


def test_there_are_results() -> None:
    assert {path.stem for path in RESULTS} >= {"demo", "step_cpu", "families"}


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_result_says_where_it_comes_from(path: Path) -> None:
    found = json.loads(path.read_text(encoding="utf-8"))
    versions = found.get("environment") or found["versions"]
    assert {"torch", "python", "platform", "threads"} <= versions.keys()
    assert found.get("rows") or found.get("seeds")


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.parent.name)
def test_the_tables_are_those_of_the_results(page: Path) -> None:
    """Run `python -m benchmarks.tables` after a benchmark."""
    text = page.read_text(encoding="utf-8")
    assert tables.filled(text, tables.PAGES[page]) == text


def test_no_family_is_silently_dead() -> None:
    """Everything the sweep ran is alive and right, or refused with a sentence; at least 95 % work as they come."""
    rows = [row for row in tables.results("families")["rows"] if row["section"] == "timm"]
    classifiers = [row for row in rows if row["verdict"] != "no classifier"]
    assert {row["verdict"] for row in classifiers} <= {"works", "refused"}
    assert all(row["sentence"] for row in classifiers if row["verdict"] == "refused")
    assert sum(row["verdict"] == "works" for row in classifiers) >= 0.95 * len(classifiers)


def test_every_way_to_train_in_a_host_was_run_and_resumes_bit_by_bit() -> None:
    rows = tables.results("hosts")["rows"]
    ways = {(row["host"], row["precision"], row["mode"], row["processes"]) for row in rows}
    assert len(ways) == len(rows) == 2 * len(hosts.cells())
    assert all(map(hosts.works, rows))


def measured(name: str) -> pytest.MarkDecorator:
    """Marks what is tested once a benchmark was run to its end and its result committed."""
    return pytest.mark.skipif(not (FOLDER / f"{name}.json").exists(), reason=f"python -m benchmarks.{name} was not run")


@measured("frozen")
def test_a_frozen_teacher_costs_next_to_nothing() -> None:
    """The promises: a step like a supervised one, faster than a live teacher's, and a pass like plain inference."""
    rows = tables.results("frozen")["rows"]
    steps = {row["arm"]: row for row in rows if row["what"] == "step"}
    read, warp, precompute = (next(row for row in rows if row["what"] == w) for w in ("read", "warp", "precompute"))
    assert steps["frozen"]["to_supervised"]["median"] <= 1.05
    assert steps["resnet34"]["to_frozen"]["median"] >= 1.5
    assert steps["densenet169"]["to_frozen"]["median"] >= 1.9
    assert read["milliseconds"]["median"] <= 1
    assert warp["ratio"]["median"] <= 0.05
    assert precompute["ratio"]["median"] <= 1.05


@measured("transfer")
def test_seeing_the_transfer_costs_little() -> None:
    """The promises: UniCAM of four layers like two forwards, far below the papers' procedure; ROAD; the monitor."""
    ratios = list(tables.results("transfer")["ratios"].values())
    unicam, papers, memory, road, _, _, share = ratios
    assert unicam <= 1.15
    assert papers >= 10
    assert memory <= 0.25
    assert road >= 5
    assert share <= 0.02


def test_the_speed_page_compares_with_every_peer() -> None:
    """A KD step is timm's, and explanations and correlations no slower than elsewhere, and equal."""
    found = {(row.what, row.to): row.ratio for row in peers.ratios()}
    peer = {to: ratio for (_, to), ratio in found.items()}
    assert {"timm.task's KD step", "grad-cam's", "Captum's", "dcor's", "the papers' code"} <= peer.keys()
    assert found["e²KD step, ResNet-34 -> ResNet-18", "timm.task's KD step"] <= 1.1
    assert max(peer["grad-cam's"], peer["Captum's"], peer["dcor's"], peer["the papers' code"]) < 1
    compared = [row for row in tables.results("beside_cpu")["rows"] if row["apart"] is not None]
    assert len(compared) == 5
    assert all(row["apart"] <= beside.SAME for row in compared)


def test_work_with_another_result_is_not_compared() -> None:
    pair = beside.Pair("a sum", "another", lambda: torch.ones(()), lambda: torch.full((), 2.0))
    with pytest.raises(ValueError, match=r"a sum: expected the same result, but they are 5\.0e-01 apart"):
        beside.compared(pair, rounds=2, warmup=0)
    assert beside.compared(pair._replace(same=False), rounds=2, warmup=0)["apart"] is None


@pytest.mark.parametrize("data", ["cifar10", "catsdogs"])
def test_the_papers_studies_are_complete_and_say_what_the_readme_says(data: str) -> None:
    """Three paired seeds of every arm. Features hand over what is relevant, beyond what two networks of one and
    the same training differ in; a teacher's answers don't."""
    rows = tables.results(f"transfer_studies_{data}")["rows"]
    seeds: dict[tuple[str, str], list[int]] = {}
    for row in rows:
        seeds.setdefault((row["study"], row["arm"]), []).append(row["seed"])
    assert seeds.keys() == {(arm.study, arm.name) for arm in transfer_studies.ARMS}
    assert all(len(each) >= 3 and sorted(each) == list(range(len(each))) for each in seeds.values())
    for row in (row for row in rows if row["arm"] == "features"):
        last = row["scores"]["layer3"]
        assert row["accuracy"] > row["base_accuracy"]
        assert last["rs_distilled"]["value"] > last["rs_residual"]["value"] + 0.2
    for score in ("rs_distilled", "teacher_fss"):
        gained = transfer_studies.against_chance(rows, score)
        assert gained["equal base, features"]["interval"][0] > 0
        low, high = gained["equal base, answers"]["interval"]
        assert low < 0 < high


@pytest.mark.parametrize("path", sorted(FOLDER.glob("limited_*_*.json")), ids=lambda path: path.stem)
def test_students_of_few_images_are_compared_in_pairs(path: Path) -> None:
    """Five seeds of each arm, each arm with what was best for it on other images and seeds."""
    found = json.loads(path.read_text(encoding="utf-8"))
    tested = [row for row in found["rows"] if row["split"] == "test"]
    tuned = [row for row in found["rows"] if row["split"] == "validation"]
    assert {row["seed"] for row in tuned}.isdisjoint(limited.SEEDS)
    for arm in {row["arm"] for row in tested}:
        mine = [row for row in tested if row["arm"] == arm]
        assert sorted(row["seed"] for row in mine) == list(limited.SEEDS)
        tried: dict[tuple[float, float | None], list[float]] = {}
        for row in tuned:
            if row["arm"] == arm:
                tried.setdefault((row["temperature"], row["weight"]), []).append(row["accuracy"])
        assert len({len(accuracies) for accuracies in tried.values()}) <= 1
        chosen = {(row["temperature"], row["weight"]) for row in mine}
        assert chosen == {max(tried, key=lambda choice: statistics.mean(tried[choice]))} if tried else len(chosen) == 1


@pytest.mark.parametrize("name", ["demo", "limited_standard_50"])
def test_a_frozen_explanation_teaches(name: str) -> None:
    """Frozen e²KD is ahead of frozen KD in accuracy and agreement: the confidence interval of five seeds is above 0."""
    found = tables.results(name)
    if name == "demo":
        compared = found["frozen_e2kd_minus_frozen_kd"]
        gains = [compared["ood_accuracy"], compared["ood_agreement"]]
    else:
        gains = list(differences(found["rows"], "frozen_e2kd", "frozen_kd", limited.MEASURES).values())
    assert len(gains) == 2
    for gain in gains:
        assert len(gain["each"]) == 5
        assert gain["interval"][0] > 0


@pytest.mark.parametrize(
    "study", ["standard_50", "standard_50_longer", "standard_200", "standard_4500", "bcos_50", "bcos_200", "bcos_4500"]
)
def test_few_images_teach_more_with_explanations(study: str) -> None:
    for gain in differences(tables.results(f"limited_{study}")["rows"], "e2kd", "kd", limited.MEASURES).values():
        assert len(gain["each"]) == 5
        assert gain["interval"][0] > 0


@pytest.mark.parametrize(
    ("name", "arm", "bases"),
    [
        ("limited_standard_50", "e2kd_all", ("e2kd", "kd", "crd", "catkd")),
        ("limited_standard_50_again", "e2kd_all", ("e2kd", "kd", "at", "dkd")),
        ("limited_standard_50_again", "at_e2kd_all", ("e2kd_all", "at")),
        ("limited_standard_50_again", "afd_e2kd_all", ("e2kd_all", "afd")),
        ("limited_standard_50_again", "fitnets_e2kd_all", ("e2kd_all", "fitnets", "afd_e2kd_all")),
        ("limited_standard_50_again", "reviewkd_e2kd_all", ("e2kd_all", "afd_e2kd_all")),
        ("limited_standard_50", "frozen_e2kd_all", ("frozen_e2kd", "frozen_kd")),
        ("limited_standard_200", "e2kd_all", ("e2kd", "kd")),
        ("limited_standard_4500", "e2kd_all", ("e2kd", "kd")),
        ("limited_vit_50", "e2kd_all", ("e2kd", "kd")),
        ("limited_standard_200_unrelated", "e2kd_all", ("e2kd", "kd")),
        ("limited_turned_50", "e2kd_all", ("e2kd", "kd")),
    ],
)
def test_signed_maps_of_all_classes_teach_more_than_the_teachers_class(
    name: str, arm: str, bases: tuple[str, ...]
) -> None:
    """And more than its rivals."""
    for base in bases:
        for gain in differences(tables.results(name)["rows"], arm, base, limited.MEASURES).values():
            assert len(gain["each"]) == 5
            assert gain["interval"][0] > 0


def test_attention_of_all_blocks_teaches_as_much_as_maps_of_all_classes() -> None:
    """The rival that e²KD does not beat; its weight was not the largest that was tried."""
    rows = tables.results("limited_standard_50_again")["rows"]
    for gain in differences(rows, "e2kd_all", "afd", limited.MEASURES).values():
        low, high = gain["interval"]
        assert low < 0 < high
    assert {row["weight"] for row in rows if row["arm"] == "afd"} == {0.2, 1.0, 5.0, 25.0}


def test_reviewkd_teaches_more_than_maps_of_all_classes() -> None:
    """The rival that is ahead of e²KD; the largest weight that was tried was its best."""
    rows = tables.results("limited_standard_50_again")["rows"]
    for gain in differences(rows, "reviewkd", "e2kd_all", limited.MEASURES).values():
        assert len(gain["each"]) == 5
        assert gain["interval"][0] > 0
    tried = {row["weight"] for row in rows if row["arm"] == "reviewkd"}
    assert {row["weight"] for row in rows if row["arm"] == "reviewkd" and row["split"] == "test"} == {max(tried)}


def test_reviewkd_is_ahead_in_bcos_networks_too_and_at_behind() -> None:
    rows = tables.results("limited_bcos_50")["rows"]
    for better, base in (("reviewkd", "e2kd"), ("e2kd", "at"), ("at", "kd")):
        for gain in differences(rows, better, base, limited.MEASURES).values():
            assert len(gain["each"]) == 5
            assert gain["interval"][0] > 0


def test_a_larger_weight_than_the_chosen_one_teaches_less_from_a_bcos_cache() -> None:
    chosen, larger = (
        values(tables.results(f"limited_bcos_{name}")["rows"], "frozen_e2kd", "accuracy") for name in ("50", "beyond")
    )
    assert chosen.keys() == larger.keys() == set(limited.SEEDS)
    lost = [100 * (chosen[seed] - larger[seed]) for seed in chosen]
    assert min(lost) > 0
    assert round(statistics.mean(lost), 1) == 2.6


def test_reviewkd_teaches_more_with_maps_of_all_classes_at_the_same_weight() -> None:
    """Of rows that were replaced for other reasons: both drew the same layers, and so saw the same augmentations."""
    rows = [row for name in ("loose", "replaced") for row in tables.results(f"limited_{name}")["rows"]]
    rows = [row for row in rows if (row["arm"], row["weight"]) in (("reviewkd_e2kd_all", 100), ("reviewkd", 25))]
    gain = differences(rows, "reviewkd_e2kd_all", "reviewkd", ["accuracy"])
    assert len(gain["accuracy"]["each"]) == 5
    assert gain["accuracy"]["interval"][0] > 0
    assert round(100 * gain["accuracy"]["mean"], 1) == 1.2


def test_the_overhaul_of_features_teaches_more_than_anything_else_and_maps_add_nothing() -> None:
    rows = tables.results("limited_standard_50_again")["rows"]
    others = {row["arm"] for row in rows if row["split"] == "test"} - {"overhaul", "overhaul_e2kd_all"}
    assert {"reviewkd", "reviewkd_e2kd_all", "fitnets_e2kd_all"} <= others
    for arm in others:
        for gain in differences(rows, "overhaul", arm, limited.MEASURES).values():
            assert len(gain["each"]) == 5
            assert gain["interval"][0] > 0
    low, high = differences(rows, "overhaul_e2kd_all", "overhaul", ["accuracy"])["accuracy"]["interval"]
    assert low < 0 < high
    before = [row for row in tables.results("limited_replaced")["rows"] if row["arm"] == "overhaul"]
    assert [(row["seed"], row["weight"], round(100 * row["accuracy"], 1)) for row in before] == [(3, 5.0, 68.3)]
    tried = {row["weight"] for row in rows if row["arm"] == "overhaul"}
    assert max(tried) > 25 in {row["weight"] for row in rows if row["arm"] == "overhaul" and row["split"] == "test"}


@pytest.mark.parametrize(
    "arm",
    [
        "overhaul",
        "fitnets",
        "afd",
        "reviewkd",
        "crd_e2kd",
        *(f"{name}_e2kd_all" for name in ("overhaul", "fitnets", "afd", "reviewkd")),
    ],
)
def test_rivals_that_see_kds_augmentations_are_as_good_as_with_their_own(arm: str) -> None:
    """Rows of both kinds are published; CRD has one of each, beside different teachers."""
    before = [row for row in tables.results("limited_loose")["rows"] if row["arm"] == arm]
    weights = {row["weight"] for row in before}  # ReviewKD has a larger one since then
    now = [row for name in ("standard_50_again", "replaced") for row in tables.results(f"limited_{name}")["rows"]]
    now, before = (values([row for row in rows if row["weight"] in weights], arm, "accuracy") for rows in (now, before))
    assert now.keys() == before.keys() == set(limited.SEEDS)
    assert all(now[seed] != before[seed] for seed in now)
    assert abs(statistics.mean(now.values()) - statistics.mean(before.values())) < 0.01


def test_e2kd_gains_as_much_beside_labels_and_the_defaults_less() -> None:
    rows = tables.results("limited_standard_50_again")["rows"]
    better = [
        ("e2kd_labels", "kd_labels"), ("e2kd_all_labels", "kd_labels"), ("e2kd_labels", "one_line"),
        ("one_line", "cross_entropy"),
    ]  # fmt: skip
    alike = [("kd_labels", "kd"), ("e2kd_labels", "e2kd"), ("e2kd_all_labels", "e2kd_all")]
    for pair in (*better, *alike):
        found = differences(rows, *pair, ["accuracy"])["accuracy"]
        assert len(found["each"]) == 5
        assert (found["interval"][0] > 0) == (pair in better)
        assert found["interval"][1] > 0


def test_classes_that_are_drawn_keep_a_part_of_the_gain() -> None:
    rows = tables.results("limited_standard_50_again")["rows"]
    better = [("e2kd_all", "e2kd_5_of_all"), ("e2kd_5_of_all", "e2kd_2_of_all"), ("e2kd_2_of_all", "kd")]
    better += [("e2kd_5_of_all", "e2kd")]
    for pair in (*better, ("e2kd_2_of_all", "e2kd")):
        found = differences(rows, *pair, ["accuracy"])["accuracy"]
        assert len(found["each"]) == 5
        assert (found["interval"][0] > 0) == (pair in better)
        assert found["interval"][1] > 0
    (first,) = [row for row in tables.results("limited_replaced")["rows"] if row["arm"] == "e2kd_2_of_all"]
    assert (first["weight"], first["accuracy"] < values(rows, "kd", "accuracy")[first["seed"]]) == (100.0, True)


def test_a_stretch_of_explanations_keeps_most_of_the_gain() -> None:
    found = sparing.gains()
    for measure in limited.MEASURES:
        kept = {arm: sparing.share(found, arm, measure) for arm in found}
        assert kept["stretch_20_50"] > 0.9
        assert max(kept["fraction_4"], kept["every_4"]) < 0.9


@pytest.mark.parametrize("name", ["limited_vit_50", "limited_bcos_vit_50"])
def test_a_vit_taught_by_a_cnn_moves_its_explanations_with_the_image(name: str) -> None:
    """e²KD is ahead of KD by more than chance, and its explanations follow the pixels as the teacher's do."""
    found = tables.results(name)
    for gain in differences(found["rows"], "e2kd", "kd", limited.MEASURES).values():
        assert len(gain["each"]) == 5
        assert gain["interval"][0] > 0
    curves = shift_curves.curves(found)
    for pixels in (1, 2):
        mean = {arm: float(each[:, pixels].mean()) for arm, each in curves.items()}
        off = {arm: abs(value - mean["teacher"]) for arm, value in mean.items()}
        assert mean["KD"] < min(mean["e²KD"], mean["frozen e²KD"])
        assert max(off["e²KD"], off["frozen e²KD"]) < off["KD"]


def test_students_of_misleading_photos_look_right_and_some_are_right() -> None:
    """All but the one with 4x4 cells have the teacher's EPG within 5 points; which gain by it is what the page says."""
    found = {right_reasons.title_of(result): result for result in right_reasons.all_results()}
    for result in found.values():
        off = abs(statistics.mean(values(result["rows"], "e2kd", "epg").values()) - result["teacher"]["epg"])
        assert (off < 0.05) == (result["student"] != "shufflenet")
        assert differences(result["rows"], "e2kd", "kd", ["epg"])["epg"]["interval"][0] > 0.1
    gains = {
        name: differences(result["rows"], "e2kd", "kd", ["ood_accuracy"])["ood_accuracy"]
        for name, result in found.items()
    }
    helped = {name for name in gains if found[name]["student"] in ("resnet", "efficientnet")}
    assert {name for name, gain in gains.items() if gain["interval"][0] > 0} == helped
    assert all(gains[name]["mean"] > 0.1 for name in helped)
    assert all(gains[name]["interval"][1] < 0 for name in gains if found[name]["student"] == "vit")


@pytest.mark.parametrize("task", ["pets", "coco"])
def test_students_look_where_their_teacher_was_guided_to_look(task: str) -> None:
    """More than KD students of it, and more than e²KD students of a teacher that was not guided."""
    rows = {
        guidance: tables.results(f"localisation_{task}_{guidance}")["rows"] for guidance in ("energy", "l1", "none")
    }
    for guidance, field in (("energy", "epg"), ("l1", "iou")):
        for measure in ("epg", "iou"):
            assert differences(rows[guidance], "e2kd", "kd", [measure])[measure]["interval"][0] > 0
        mine, others = (values(rows[name], "e2kd", field) for name in (guidance, "none"))
        assert len(mine) == 5
        assert all(mine[seed] - others[seed] > 0.05 for seed in mine)


def test_where_the_background_misleads_the_teachers_class_teaches_more_than_all() -> None:
    again = tables.results("right_reasons_efficientnet_again")["rows"]
    for arm in ("e2kd", "e2kd_all"):
        assert differences(again, arm, "kd", ["ood_accuracy"])["ood_accuracy"]["interval"][0] > 0
    rows = tables.results("right_reasons_resnet")["rows"]
    for base, arm in (("kd", "e2kd_all"), ("e2kd_all", "e2kd")):
        gain = differences(rows, arm, base, ["ood_accuracy"])["ood_accuracy"]
        assert len(gain["each"]) == 5
        assert gain["interval"][0] > 0


def test_dynamic_weights_of_one_class_teach_more_than_cams_of_all() -> None:
    rows = tables.results("limited_bcos_50")["rows"]
    for base, arm in (("kd", "e2kd_all"), ("e2kd_all", "e2kd")):
        for gain in differences(rows, arm, base, limited.MEASURES).values():
            assert len(gain["each"]) == 5
            assert gain["interval"][0] > 0


@measured("cells")
def test_students_that_gain_nothing_read_the_background_through_cells_on_the_animal() -> None:
    """They are the students of the other table; cells on the animal decide for the animal where e²KD helps alone."""
    rows = tables.results("cells")["rows"]
    known = {found["student"]: found["rows"] for found in cells.first_results()}
    for student in ("resnet", "efficientnet", "convnext", "vit"):
        mine = {row["seed"]: row for row in rows if row["student"] == student}
        accuracies = values(known[student], "e2kd", "ood_accuracy")
        assert sorted(mine) == list(cells.SEEDS)
        assert all(row["ood_accuracy"] == accuracies[seed] for seed, row in mine.items())
        helped = student in ("resnet", "efficientnet")
        assert all((row["on_animal"] > 0.5) == helped for row in mine.values())
        assert all((row["pixels"] > 0.25) == helped for row in mine.values())
