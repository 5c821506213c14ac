"""Caches of frozen explanations: precision, order, identity, and what is refused when writing."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from frozen_worker import (
    IDS,
    RECORD,
    SAMPLES,
    SHARD_ROWS,
    answers,
    contents,
    expected,
    same,
    settings,
    write,
)
from safetensors import safe_open
from safetensors.numpy import load_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import e2kd
from e2kd.frozen import forecast
from e2kd.frozen.errors import CacheError
from e2kd.frozen.fingerprints import hash_ids, hash_json, hash_weights, id_hash
from e2kd.frozen.merging import merge
from e2kd.frozen.records import Record
from e2kd.frozen.store import Store
from e2kd.frozen.writer import Writer

RECORDS = [
    RECORD,
    Record(5),
    Record(5, top=2),
    Record(5, map_shape=(1, 2, 3), map_type="uint8"),
    Record(5, top=3, map_shape=(3, 1, 5), map_type="int8"),
    Record(70000, top=2, map_shape=(1, 1, 1)),
]


def dice(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ids(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.uint64)


def round_trip(record: Record, logits: Tensor, maps: Tensor | None = None) -> Any:
    zeros = torch.zeros(len(logits), dtype=torch.long)
    return record.decode(record.encode(logits, maps, zeros, ids(len(logits))))


def map_back(maps: Tensor, kind: str) -> Tensor:
    record = Record(2, map_shape=tuple(maps.shape[1:]), map_type=kind)
    found: Tensor = round_trip(record, torch.zeros(len(maps), 2), maps).maps
    return found


# Precision


def test_logits_keep_eleven_bits() -> None:
    logits = torch.randn(64, 100, generator=dice()) * 10
    found = round_trip(Record(100), logits).logits
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, logits, rtol=2**-11, atol=2**-24)
    assert torch.equal(round_trip(Record(100), found).logits, found)


@pytest.mark.parametrize("scale", [1e-38, 1e-12, 1.0, 1e12, 1e37])
def test_float16_maps_keep_their_precision_at_any_magnitude(scale: float) -> None:
    maps = torch.randn(32, 2, 5, 5, generator=dice()) * scale
    found = map_back(maps, "float16")
    peak = maps.abs().amax((1, 2, 3), keepdim=True)
    assert ((found - maps).abs() <= maps.abs() * 2**-11 + peak * 2**-24).all()


@pytest.mark.parametrize("kind", ["float16", "int8", "uint8"])
def test_maps_of_small_whole_numbers_come_back_exactly(kind: str) -> None:
    unit = {"float16": 2048, "int8": 127, "uint8": 255}[kind]
    maps = torch.arange(unit + 1.0).reshape(1, 1, 1, -1)
    assert torch.equal(map_back(maps, kind).round(), maps)
    torch.testing.assert_close(map_back(maps, kind), maps)


@pytest.mark.parametrize(("kind", "signed"), [("int8", True), ("int8", False), ("uint8", False)])
@pytest.mark.parametrize("shape", [(1, 7, 7), (6, 56, 56)])
def test_eight_bits_hardly_turn_a_map(kind: str, signed: bool, shape: tuple[int, int, int]) -> None:
    maps = torch.randn(16, *shape, generator=dice()) * torch.logspace(-20, 20, 16)[:, None, None, None]
    maps = maps if signed else maps.abs()
    found = map_back(maps, kind)
    turned = 1 - e2kd.cosine(found.double(), maps.double())
    assert 0 < turned.max() < 1.2e-4
    assert ((found - maps).abs().amax((1, 2, 3)) <= maps.abs().amax((1, 2, 3)) / 250).all()


@pytest.mark.parametrize("kind", ["float16", "int8", "uint8"])
def test_a_zero_map_stays_zero_and_no_other_becomes_one(kind: str) -> None:
    maps = torch.zeros(3, 1, 2, 2)
    maps[1, 0, 0, 0], maps[2, 0, 1, 1] = 1e-45, 3e38  # the smallest and nearly the largest float32
    assert map_back(maps, kind).flatten(1).any(1).tolist() == [False, True, True]


def test_top_logits_keep_their_values_and_everybodys_probability() -> None:
    logits, record = torch.randn(32, 100, generator=dice()) * 4, Record(100, top=10)
    found = round_trip(record, logits).logits
    values, where = logits.topk(10)
    torch.testing.assert_close(found.gather(1, where), values, rtol=2**-11, atol=2**-24)
    p, q = logits.double().softmax(1), found.double().softmax(1)
    torch.testing.assert_close(q.gather(1, where).sum(1), p.gather(1, where).sum(1), rtol=0, atol=2e-3)
    assert torch.equal(found.argmax(1), logits.argmax(1))
    assert (found.scatter(1, where, -torch.inf).amax(1) <= values[:, -1]).all()


def test_top_logits_lose_only_how_the_rest_is_shared() -> None:
    """KL(all || stored) is the rest's mass times its distance from an even split: the closed form, in a slow loop."""
    logits = (torch.randn(16, 40, generator=dice()) * 3).half().float()
    found = round_trip(Record(40, top=30), logits).logits.double()
    kl = (logits.double().softmax(1) * (logits.double().log_softmax(1) - found.log_softmax(1))).sum(1)
    for row, value in zip(logits.double().softmax(1), kl, strict=True):
        rest = row.sort().values[:10]
        even = sum(float(p) * np.log(float(p) * 10 / float(rest.sum())) for p in rest)
        assert float(value) == pytest.approx(even, rel=1e-3, abs=1e-6)
    assert kl.max() < 0.05


def test_equal_logits_are_ranked_by_class() -> None:
    logits = torch.tensor([[-0.0, 0.0, 2.0, 2.0, 0.0], [-1.0, -1.0, -1.0, -3.0, -1.0]])
    stored = Record(5, top=3).encode(logits, None, torch.zeros(2, dtype=torch.long), ids(2))
    assert stored["top_classes"].tolist() == [[2, 3, 0], [0, 1, 2]]


def test_the_ranking_agrees_with_a_stable_sort() -> None:
    logits = (torch.randn(64, 300, generator=dice()) * 3).round(decimals=1)
    stored = Record(300, top=40).encode(logits, None, torch.zeros(64, dtype=torch.long), ids(64))
    assert np.array_equal(stored["top_classes"], np.argsort(-logits.numpy(), 1, kind="stable")[:, :40])


# What is refused

LOGITS, MAPS, CHOICE = torch.zeros(3, 5), torch.zeros(3, 1, 2, 3), torch.zeros(3, dtype=torch.long)


def broken(value: Tensor, number: float) -> Tensor:
    value = value.clone()
    value[1].view(-1)[-1] = number
    return value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": broken(LOGITS, torch.nan)}, "finite logits, but row 1 of these 3 has NaN"),
        ({"logits": broken(LOGITS, -torch.inf)}, "finite logits, but row 1 of these 3"),
        ({"logits": broken(LOGITS, 65520.0)}, "within ±65,504, the largest float16, but row 1 of these 3"),
        ({"maps": broken(MAPS, torch.nan)}, "finite maps, but row 1 of these 3"),
        ({"maps": broken(MAPS, torch.inf)}, "finite maps, but row 1 of these 3"),
        ({"maps": broken(MAPS, -1.0)}, 'maps >= 0 .* row 1 of these 3 has negative values. Use map_type="int8"'),
        ({"maps": None}, r"map_shape \(1, 2, 3\), but got None"),
        ({"maps": torch.zeros(3, 1, 3, 2)}, r"maps \[3, 1, 2, 3\], but got \[3, 1, 3, 2\]"),
        ({"logits": torch.zeros(3, 4)}, r"logits \[3, 5\], but got \[3, 4\]"),
        ({"classes": torch.zeros(2, dtype=torch.long)}, r"classes \[3\], but got \[2\]"),
        ({"classes": torch.tensor([0, 5, -1])}, r"in \[0, 4\] as classes, but got 5, -1"),
        ({"classes": torch.zeros(3)}, "as classes, but got torch.float32"),
        ({"ids": ids(4)}, r"ids \[3\], but got \[4\]"),
        ({"ids": np.arange(3)}, "ids as uint64, .* but got int64"),
    ],
)
def test_encode_refuses(change: dict[str, Any], message: str) -> None:
    whole = {"logits": LOGITS, "maps": MAPS, "classes": CHOICE, "ids": ids(3)}
    record = Record(5, map_shape=(1, 2, 3), map_type="uint8")
    record.encode(**whole)
    with pytest.raises(ValueError, match=message):
        record.encode(**whole | change)


def test_encode_refuses_maps_where_none_are_kept() -> None:
    with pytest.raises(ValueError, match=r"map_shape None, but got \[3, 1, 2, 3\]"):
        Record(5).encode(LOGITS, MAPS, CHOICE, ids(3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 0}, "num_classes >= 1"),
        ({"num_classes": True}, "num_classes >= 1"),
        ({"num_classes": 5, "top": 5}, r"top in \[1, 4\]"),
        ({"num_classes": 5, "top": 0}, r"top in \[1, 4\]"),
        ({"num_classes": 5, "map_shape": (7, 7)}, r"\(C, h, w\)"),
        ({"num_classes": 5, "map_shape": (1, 0, 7)}, r"\(C, h, w\)"),
        ({"num_classes": 5, "map_type": "float8"}, "float16, int8, uint8"),
    ],
)
def test_layouts_that_do_not_exist_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Record(**arguments)


@pytest.mark.parametrize("record", RECORDS, ids=repr)
def test_records_survive_json(record: Record) -> None:
    assert Record.from_json(json.loads(json.dumps(record.to_json()))) == record


@pytest.mark.parametrize("found", [None, [], {}, {"num_classes": 3}, RECORD.to_json() | {"more": 1}])
def test_what_is_no_record_is_refused(found: Any) -> None:
    with pytest.raises(CacheError, match="none that this e2kd knows"):
        Record.from_json(found)


# Reading


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    assert write(folder)
    return folder


@pytest.mark.parametrize("record", RECORDS, ids=repr)
def test_every_layout_is_read_as_it_was_written(record: Record, tmp_path: Path) -> None:
    assert write(tmp_path, record=record)
    store = Store(tmp_path)
    assert len(store) == SAMPLES
    assert store.record == record
    found = store.rows(range(SAMPLES))
    assert same(found, expected(range(SAMPLES), record))
    assert found.maps.shape == (SAMPLES, *(record.map_shape or (0, 0, 0)))
    assert found.logits.dtype == found.maps.dtype == torch.float32
    assert found.classes.dtype == torch.int64
    store.check()


@pytest.mark.parametrize("seed", range(20))
def test_reads_in_any_order_equal_reads_in_order(cache: Path, seed: int) -> None:
    chosen = torch.randint(SAMPLES, (int(torch.randint(1, 100, (), generator=dice(seed))),), generator=dice(seed))
    everything = Store(cache).rows(range(SAMPLES))
    found = Store(cache).rows(chosen)
    assert torch.equal(found.logits, everything.logits[chosen])
    assert torch.equal(found.maps, everything.maps[chosen])
    assert torch.equal(found.classes, everything.classes[chosen])
    assert np.array_equal(found.ids, everything.ids[chosen.numpy()])


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor, lambda i: np.array(i, dtype=np.uint8)])
def test_indices_come_as_anything(cache: Path, kind: Any) -> None:
    assert same(Store(cache).rows(kind([45, 0, 3, 3])), expected([45, 0, 3, 3]))


def test_no_indices_give_no_rows(cache: Path) -> None:
    found = Store(cache).rows([])
    assert found.logits.shape == (0, 5)
    assert found.maps.shape == (0, 1, 2, 3)


@pytest.mark.parametrize("indices", [[-1], [0, SAMPLES], [2**40], np.array([2**64 - 1], dtype=np.uint64)])
def test_rows_that_do_not_exist_are_index_errors(cache: Path, indices: Any) -> None:
    with pytest.raises(IndexError, match=r"in \[0, 45\], but got"):
        Store(cache).rows(indices)


@pytest.mark.parametrize("indices", [3, [True, False], [0.0], [[1, 2]], ["1"], torch.tensor([1.0])])
def test_indices_that_are_no_row_numbers_are_refused(cache: Path, indices: Any) -> None:
    with pytest.raises(TypeError, match=r"whole numbers \[B\]"):
        Store(cache).rows(indices)


def test_rows_belong_to_the_caller(cache: Path) -> None:
    store = Store(cache)
    for value in store.rows([0, 1]):
        value[...] = 0
    store.ids()[:] = 0
    assert same(store.rows([0, 1]), expected([0, 1]))
    assert np.array_equal(store.ids(), IDS)


def test_ids_zero_maps_and_progress(cache: Path) -> None:
    store, counts = Store(cache), []
    store.check(progress=counts.append)
    assert counts == [SHARD_ROWS] * 11 + [2]
    assert np.array_equal(store.ids(), IDS)
    assert store.zero_maps == 1


def test_stores_travel_without_their_maps(cache: Path) -> None:
    store = Store(cache)
    store.rows([0])
    before = len(pickle.dumps(store))
    store.rows(range(SAMPLES))
    store.ids()
    assert len(pickle.dumps(store)) == before
    assert same(pickle.loads(pickle.dumps(store)).rows([9]), expected([9]))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files in /proc")
def test_an_open_shard_holds_no_file_handle(cache: Path) -> None:
    store = Store(cache)
    before = len(os.listdir("/proc/self/fd"))
    store.rows(range(SAMPLES))
    assert len(os.listdir("/proc/self/fd")) == before


def test_shards_are_standard_safetensors(cache: Path) -> None:
    path = cache / "shard-000001.safetensors"
    tensors = load_file(path)
    wanted = answers(range(4, 8))
    assert set(tensors) == {*wanted, "crc"}
    assert all(np.array_equal(tensors[name], wanted[name]) for name in wanted)
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["e2kd"])["shard"] == 1
        assert file.get_slice("logits").get_dtype() == "F16"


# Writing


@pytest.mark.parametrize("world", [1, 2, 3, 50])
def test_the_bytes_do_not_depend_on_who_wrote_them(cache: Path, tmp_path: Path, world: int) -> None:
    complete = [write(tmp_path, rank, world) for rank in reversed(range(world))]
    assert complete == [False] * (world - 1) + [True] or world > 12  # more processes than shards: some have none
    assert complete[-1]
    assert contents(tmp_path) == contents(cache)


def test_shards_are_shared_out_once(tmp_path: Path) -> None:
    writers = [Writer(tmp_path, settings(), RECORD, rank, 5) for rank in range(5)]
    assert sorted(index for writer in writers for index in writer.todo()) == list(range(12))
    assert [row for index in range(writers[0].shards) for row in writers[0].rows(index)] == list(range(SAMPLES))


def test_finished_shards_are_not_computed_again(tmp_path: Path) -> None:
    writer = Writer(tmp_path, settings(), RECORD)
    for index in (0, 5):
        writer.write(index, answers(writer.rows(index)))
    again = Writer(tmp_path, settings(), RECORD)
    assert again.todo() == [1, 2, 3, 4, 6, 7, 8, 9, 10, 11]
    assert again.done() == [0, 5]
    assert not again.finish()


def test_finishing_twice_changes_nothing(tmp_path: Path) -> None:
    assert write(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert write(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    Writer(tmp_path, settings(), RECORD)
    changed = settings(explainer={"name": "GradCAM", "layer": "layer3"}, classes="labels", extra=1)
    with pytest.raises(CacheError) as error:
        Writer(tmp_path, changed, Record(5, map_shape=(1, 7, 7)))
    for part in (
        "classes is 'teacher' there but 'labels' here",
        "explainer.layer is 'layer4' there but 'layer3' here",
        "extra is missing there but 1 here",
        "record.map_shape is [1, 2, 3] there but [1, 7, 7] here",
        str(tmp_path),
    ):
        assert part in str(error.value)
    assert "weights" not in str(error.value)


def test_a_complete_cache_is_not_overwritten_when_its_plan_is_lost(cache: Path, tmp_path: Path) -> None:
    shutil.copytree(cache, tmp_path / "copy")
    (tmp_path / "copy" / "plan.json").unlink()
    with pytest.raises(CacheError, match="classes is 'teacher' there but 'labels' here"):
        Writer(tmp_path / "copy", settings(classes="labels"), RECORD)
    assert write(tmp_path / "copy")
    assert contents(tmp_path / "copy") == contents(cache)


def test_other_software_or_batches_may_go_on_but_warn(cache: Path, tmp_path: Path) -> None:
    write(tmp_path, rank=1, world=2)
    with pytest.warns(UserWarning, match="batch_size is 2 there but 64 here, versions.timm is missing there but"):
        assert write(tmp_path, plan=settings(batch_size=64, versions={"timm": "9.0"}))
    assert contents(tmp_path) == contents(cache)


@pytest.mark.parametrize(
    "plan",
    [{}, {"dataset": {"samples": 0}, "shard_rows": 2}, {"dataset": {"samples": 3}}, {"dataset": 3, "shard_rows": 2}],
)
def test_a_plan_needs_counts(tmp_path: Path, plan: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="whole numbers >= 1"):
        Writer(tmp_path, plan, RECORD)
    assert not list(tmp_path.iterdir())


def test_a_plan_is_json(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        Writer(tmp_path, settings(teacher=nn.Identity()), RECORD)
    with pytest.raises(ValueError, match="JSON"):
        Writer(tmp_path, settings(teacher=float("nan")), RECORD)


@pytest.mark.parametrize(("rank", "world"), [(-1, 2), (2, 2), (0, 0)])
def test_ranks_are_below_world(tmp_path: Path, rank: int, world: int) -> None:
    with pytest.raises(ValueError, match="rank from 0 to world - 1"):
        Writer(tmp_path, settings(), RECORD, rank, world)


def test_fields_have_to_be_those_of_the_shard(tmp_path: Path) -> None:
    writer = Writer(tmp_path, settings(), RECORD)
    good = answers(writer.rows(0))
    bad: list[dict[str, np.ndarray]] = [
        answers(range(3)),
        good | {"more": good["ids"]},
        {name: array for name, array in good.items() if name != "maps"},
        good | {"logits": good["logits"].astype(np.float32)},
    ]
    for fields in bad:
        with pytest.raises(ValueError, match="Expected the fields of 4 encoded rows"):
            writer.write(0, fields)
    with pytest.raises(IndexError, match=r"in \[0, 11\], but got 12"):
        writer.write(12, good)
    assert writer.done() == []


def test_rows_of_other_samples_are_not_sealed(tmp_path: Path) -> None:
    writer = Writer(tmp_path, settings(), RECORD)
    for index in writer.todo():
        rows = [row ^ 1 for row in writer.rows(index)]  # neighbours changed places
        writer.write(index, answers(rows))
    with pytest.raises(CacheError, match=r"dataset\.ids_hash"):
        writer.finish()
    assert not (tmp_path / "manifest.json").exists()


def test_file_systems_without_hard_links_will_do(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    assert write(tmp_path / "a")
    assert contents(tmp_path / "a") == contents(cache)
    with pytest.raises(CacheError, match="other settings"):
        Writer(tmp_path / "a", settings(classes="labels"), RECORD)
    merge([tmp_path / "a"], tmp_path / "b")
    assert contents(tmp_path / "b") == contents(cache)


def test_another_working_directory_changes_nothing(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(cache.parent)
    store = Store(cache.name)
    monkeypatch.chdir(tmp_path)
    assert len(store.rows([0, 1]).classes) == 2


def test_a_file_is_no_cache_and_no_place_for_one(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(CacheError, match="Expected a cache in"):
        Store(file)
    with pytest.raises(CacheError, match="Expected a folder to write the cache into"):
        e2kd.freeze(nn.Linear(1, 1), TensorDataset(torch.zeros(1, 3, 8, 8)), file)


# Merging


def ranks(folder: Path, world: int = 3, **changes: Any) -> list[Path]:
    """A folder for each process, as different machines leave them."""
    folders = [folder / f"rank{rank}" for rank in range(world)]
    for rank, path in enumerate(folders):
        write(path, rank, world, plan=settings(**changes))
    return folders


def test_merged_folders_are_the_cache_one_process_writes(cache: Path, tmp_path: Path) -> None:
    folders = ranks(tmp_path)
    before = [contents(folder) for folder in folders]
    store = merge(folders, tmp_path / "all")
    assert same(store.rows(range(SAMPLES)), expected(range(SAMPLES)))
    assert contents(tmp_path / "all") == contents(cache)
    assert [contents(folder) for folder in folders] == before
    merge(folders, folders[0])  # into one of them
    assert contents(folders[0]) == contents(cache)
    merge([*folders, cache], tmp_path / "all")  # again, with more of the same
    assert contents(tmp_path / "all") == contents(cache)


def test_merging_refuses_what_is_no_cache(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one"):
        merge([], tmp_path / "all")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CacheError, match=r"no plan\.json"):
        merge([tmp_path / "empty"], tmp_path / "all")
    assert not (tmp_path / "all").exists()


def test_merging_refuses_other_settings(tmp_path: Path) -> None:
    first, *_ = ranks(tmp_path / "a")
    _, second, _ = ranks(tmp_path / "b", teacher={"name": "net", "weights": "cd"})
    with pytest.raises(CacheError, match=r"teacher\.weights is 'ab' there but 'cd' here"):
        merge([first, second], tmp_path / "all")
    assert not (tmp_path / "all").exists()


def test_merging_names_what_no_folder_has(tmp_path: Path) -> None:
    folders = ranks(tmp_path)
    with pytest.raises(CacheError, match=r"shard-000001.safetensors, shard-000004.safetensors, .*\(4 of 12 shards\)"):
        merge([folders[0], folders[2]], tmp_path / "all")


def test_merging_refuses_two_results_for_one_shard(tmp_path: Path) -> None:
    first, second, third = ranks(tmp_path)
    writer = Writer(second, settings(), RECORD)
    fields = answers(writer.rows(0))
    fields["logits"] = fields["logits"] + np.float16(1)
    writer.write(0, fields)
    with pytest.raises(CacheError, match=r"shard-000000.safetensors has other rows than .* computed twice"):
        merge([first, second, third], tmp_path / "all")


def test_merging_refuses_a_damaged_shard(tmp_path: Path) -> None:
    folders = ranks(tmp_path)
    path = folders[1] / "shard-000001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x99")
    said = f"In {folders[1]}: shard-000001.safetensors is damaged at row"
    with pytest.raises(CacheError, match=said):
        merge(folders, tmp_path / "all")
    with pytest.raises(CacheError, match=said):
        merge(folders, folders[1])  # where it lies already
    intact = ranks(tmp_path / "again")[1] / "shard-000001.safetensors"
    (folders[0] / path.name).write_bytes(intact.read_bytes())
    with pytest.raises(CacheError, match=said):
        merge([folders[0], folders[2]], folders[1])  # beside one that is whole
    (folders[0] / path.name).unlink()
    with pytest.raises(CacheError, match=said):
        merge([folders[0], folders[2]], folders[1])  # which no folder has else


# Forecast

Usage = namedtuple("Usage", "total used free")


def test_the_forecast_is_what_is_written(cache: Path) -> None:
    said = forecast.Forecast.of(RECORD, SAMPLES)
    tensors = [load_file(path) for path in cache.glob("shard-*")]
    assert said.total == sum(array.nbytes for shard in tensors for array in shard.values())
    assert str(said) == "46 rows x 42 bytes = 1.9 kB"


def test_what_does_not_fit_is_refused_before_it_is_computed(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = Record(1000, map_shape=(6, 56, 56), map_type="int8")
    assert forecast.check_space(RECORD, 10, tmp_path / "not" / "there").rows == 10
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 26_000_000_000))
    with pytest.raises(
        OSError, match=r"needs 26.7 GB \(1,281,167 rows x 20,836 bytes = 26.7 GB\), but .* 26.0 GB free"
    ):
        forecast.check_space(record, 1_281_167, tmp_path / "not" / "there")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 0))
    forecast.check_space(RECORD, SAMPLES, cache)  # it is there already


# Fingerprints


def test_weights_differ_in_anything_and_agree_in_everything() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    same_net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    same_net.load_state_dict(net.state_dict())
    first = hash_weights(net)
    assert hash_weights(same_net.eval().requires_grad_(False)) == first
    assert hash_weights(same_net.to(memory_format=torch.channels_last)) == first
    found = {first, hash_weights(nn.Sequential(*net).double()), hash_weights(nn.Sequential(*net).bfloat16())}
    net.float().load_state_dict(same_net.state_dict())
    assert hash_weights(net) == first
    net[1].num_batches_tracked += 1  # a buffer
    found.add(hash_weights(net))
    net[0].weight.data.view(torch.int32).view(-1)[0] ^= 1  # one bit
    found.add(hash_weights(net))
    found.add(hash_weights(nn.ModuleDict({"a": net[0], "b": net[1]})))
    found.add(hash_weights(nn.Sequential(net[0])))
    assert len(found) == 7


def test_a_shape_is_part_of_the_weights() -> None:
    a, b = nn.Module(), nn.Module()
    a.register_buffer("x", torch.zeros(2, 3))
    b.register_buffer("x", torch.zeros(3, 2))
    assert hash_weights(a) != hash_weights(b)


def test_state_without_bytes_is_refused() -> None:
    class Odd(nn.Module):
        def get_extra_state(self) -> dict[str, int]:
            return {"a": 1}

    with pytest.raises(TypeError, match="'_extra_state' is a dict"):
        hash_weights(Odd())


def test_ids_of_any_file_name() -> None:
    odd = os.fsdecode(b"caf\xe9.png")  # no valid UTF-8
    hashes = {id_hash(name) for name in (odd, "café.png", "", "a", "a\x00")}
    assert len(hashes) == 5
    assert all(0 <= number < 2**64 for number in hashes)
    with pytest.raises(TypeError, match="uint64"):
        hash_ids(np.arange(3))


def test_settings_are_hashed_as_json_reads_them_back() -> None:
    value = {10: (1, 2.5, None), 9: {"b": True, "a": "é"}}
    assert hash_json(value) == hash_json(json.loads(json.dumps(value)))
    assert hash_json({"a": 1}) != hash_json({"a": 1.5})
