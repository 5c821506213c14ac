"""What can happen to a cache: kills, full disks, flipped bits, cut and foreign files. No row is ever silently wrong."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from frozen_worker import (
    RECORD,
    SAMPLES,
    Reading,
    answers,
    contents,
    expected,
    same,
    settings,
    write,
    write_and_die,
)
from safetensors.numpy import load_file, save_file
from torch.utils.data import DataLoader

from e2kd.frozen.errors import CacheError
from e2kd.frozen.files import remove_leftovers
from e2kd.frozen.fingerprints import canonical, digest
from e2kd.frozen.records import Record
from e2kd.frozen.shards import Shard, shard_name
from e2kd.frozen.store import Store
from e2kd.frozen.writer import Writer

EVERYTHING = range(SAMPLES)
RIGHT = expected(EVERYTHING)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    assert write(folder)
    return folder


@pytest.fixture
def copy(cache: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(cache, tmp_path / "copy"))


def read(folder: Path) -> str:
    """The error when all rows are read, or nothing if they are right; wrong rows fail the test."""
    try:
        found = Store(folder).rows(EVERYTHING)
    except CacheError as error:
        return str(error)
    assert same(found, RIGHT), "wrong rows, and nothing was said"
    return ""


def reseal(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a sealed file and give it the right checksum, as an attacker or a careful vandal would."""
    content = json.loads(path.read_text())
    content.pop("checksum")
    change(content)
    content["checksum"] = digest(canonical(content).encode())
    path.write_text(json.dumps(content))


# Kills


@pytest.fixture(scope="module")
def processes() -> Iterator[Any]:
    """Processes that start within milliseconds: they are forked from one that has imported everything."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["frozen_worker"])
    yield context
    os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory, where syncing costs nothing, if the system has one."""
    disk = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=disk if os.access(disk, os.W_OK) else tmp_path) as folder:
        yield Path(folder)


def start(processes: Any, *arguments: Any, target: Callable[..., Any] = write) -> Any:
    process = processes.Process(target=target, args=arguments)
    process.start()
    return process


def test_twenty_kills_leave_the_same_bytes(processes: Any, cache: Path, memory: Path) -> None:
    """One to three processes, killed at random moments and begun again until the cache is complete."""
    finish(processes, memory / "first", 2)  # imports what all of them need
    begin = time.monotonic()
    finish(processes, memory / "whole", 2)
    usual, dice, killed, partial = time.monotonic() - begin, random.Random(0), 0, 0
    for folder in (memory / str(number) for number in range(100)):
        if killed >= 20 and partial >= 5:
            break
        for _ in range(3):
            world = dice.randint(1, 3)
            writers = [start(processes, folder, rank, world) for rank in range(world)]
            time.sleep(dice.uniform(0, usual))
            killed += sum(map(kill, writers))
            there = contents(folder) if folder.exists() else {}
            whole = {name: found for name, found in there.items() if ".part." not in name}
            assert whole.items() <= contents(cache).items()
            assert ("manifest.json" in whole) == (read(folder) == "")
            partial += 2 <= len(whole) < 14
        finish(processes, folder, 2)
        assert contents(folder) == contents(cache)
    assert killed >= 20
    assert partial >= 5  # kills after some shards and before all


def kill(process: Any) -> bool:
    """Kill a process of ours; whether it was still at work."""
    if process.is_alive():
        process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return bool(process.exitcode)


def finish(processes: Any, folder: Path, world: int) -> None:
    for process in [start(processes, folder, rank, world) for rank in range(world)]:
        process.join()
        assert process.exitcode == 0


def test_a_kill_before_any_file_operation_leaves_the_same_bytes(processes: Any, cache: Path, memory: Path) -> None:
    """Every moment between two operations, in turn, and then another process that goes on from there."""
    operations = 0
    for operation in range(100):
        folder = memory / str(operation)
        process = start(processes, str(folder), 0, 1, operation, target=write_and_die)
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        operations += 1
        assert "missing" in read(folder) or "neither" in read(folder) or (folder / "manifest.json").exists()
        assert write(folder)
        assert contents(folder) == contents(cache)
    # Sync, name and sync the folder: plan, 12 shards, manifest.
    assert operations == 3 * 14


def test_one_of_two_processes_with_different_settings_is_refused(processes: Any, tmp_path: Path) -> None:
    for attempt in range(3):
        folder = tmp_path / str(attempt)
        plans = [settings(), settings(classes="labels")]
        both = [start(processes, folder, 0, 1, RECORD, plan) for plan in plans]
        for process in both:
            process.join()
        assert sorted(process.exitcode for process in both) == [0, 1]
        assert Store(folder).plan["classes"] == plans[[p.exitcode for p in both].index(0)]["classes"]


def test_leftovers_of_the_dead_are_removed_and_those_of_the_living_kept(tmp_path: Path) -> None:
    dead = tmp_path / "shard-000000.safetensors.part.123.0123abcd"
    living = tmp_path / "manifest.json.part.123.89abcdef"
    users = [tmp_path / name for name in ("notes.part.1.0123abcd", "shard-000000.safetensors", "plan.json.part.txt")]
    for path in (dead, living, *users):
        path.write_bytes(b"half")
    code = f"import fcntl, sys; f = open({str(living)!r}); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    with subprocess.Popen(
        [shutil.which("python3") or "python3", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        remove_leftovers(tmp_path)
        assert sorted(tmp_path.iterdir()) == sorted([living, *users])
        other.communicate(b"\n")
    remove_leftovers(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(users)


# Flipped bits


def flip(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0] ^ (1 << bit % 8)
        file.seek(bit // 8)
        file.write(bytes([byte]))


def spoil(path: Path) -> None:
    """Flip a bit in the last byte: of the last row's map, or whatever lies last."""
    flip(path, 8 * (path.stat().st_size - 1))


def test_a_hundred_flipped_bits_are_never_silent(copy: Path) -> None:
    dice, files, found = random.Random(1), sorted(copy.iterdir()), 0
    for _ in range(100):
        path = dice.choice(files)
        bit = dice.randrange(8 * path.stat().st_size)
        flip(path, bit)
        problem = read(copy)
        assert path.name in problem or not problem
        found += bool(problem)
        flip(path, bit)
    assert read(copy) == ""
    assert found >= 95  # white space between the words of a JSON file may change without harm


def test_a_flipped_bit_in_any_byte_of_a_shard_is_found(copy: Path) -> None:
    path, dice = copy / "shard-000002.safetensors", random.Random(2)
    for byte in range(path.stat().st_size):
        bit = 8 * byte + dice.randrange(8)
        flip(path, bit)
        assert path.name in read(copy), f"byte {byte}"
        flip(path, bit)
    assert read(copy) == ""


@pytest.mark.parametrize("name", ["manifest.json", "plan.json"])
def test_a_flipped_bit_in_any_byte_of_a_json_file_is_found_or_harmless(copy: Path, name: str) -> None:
    path, dice, harmless = copy / name, random.Random(3), []
    text = path.read_bytes()
    for byte in range(0, len(text), 3):
        bit = 8 * byte + dice.randrange(8)
        flip(path, bit)
        problem = read(copy)
        assert name in problem or not problem
        harmless += [] if problem else [text[byte : byte + 1]]
        flip(path, bit)
    assert {character for character in harmless} <= {b" ", b"\n"}


def test_damage_is_named_by_file_and_row_and_leaves_other_rows_readable(copy: Path) -> None:
    path = copy / "shard-000002.safetensors"
    with path.open("r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"\xff\xff\xff")
    store = Store(copy)
    with pytest.raises(CacheError, match=r"shard-000002.safetensors is damaged at row 11 \(row 3 of the file\)"):
        store.rows([0, 11, 20])
    others = [row for row in EVERYTHING if row != 11]
    assert same(store.rows(others), expected(others))
    with pytest.raises(CacheError, match=r"1 of 12 shards in .* are damaged. shard-000002.safetensors"):
        store.check()


def test_check_knows_the_very_files(copy: Path) -> None:
    """Rows written anew under the same plan verify one by one, but are not those that were sealed."""
    writer = Writer(copy, settings(), RECORD)
    fields = answers(writer.rows(2))
    writer.write(2, fields | {"logits": fields["logits"] + np.float16(1)})
    with pytest.raises(CacheError, match=r"1 of 12 .* shard-000002\.safetensors is not the file that the manifest"):
        Store(copy).check()
    assert writer.finish()  # seals them as they are now
    Store(copy).check()


def test_damaged_shards_are_written_again_with_a_warning(cache: Path, copy: Path) -> None:
    before = contents(copy)
    spoil(copy / "shard-000001.safetensors")
    (copy / "shard-000004.safetensors").write_bytes(b"")
    (copy / "shard-000006.safetensors").unlink()
    (copy / "manifest.json").write_bytes(b"{")
    with pytest.warns(UserWarning, match="has to be computed again: shard-00000[14]") as warned:
        assert Writer(copy, settings(), RECORD).todo() == [1, 4, 6]
    assert len(warned) == 2
    with pytest.warns(UserWarning, match="has to be computed again"):
        assert write(copy)
    assert contents(copy) == before == contents(cache)


def test_a_cache_is_not_completed_over_a_damaged_shard_of_another_process(tmp_path: Path) -> None:
    write(tmp_path, rank=1, world=2)
    spoil(tmp_path / "shard-000003.safetensors")
    with pytest.warns(UserWarning, match="shard-000003"):
        assert not write(tmp_path, rank=0, world=2)
    assert not (tmp_path / "manifest.json").exists()


def test_ids_are_verified(copy: Path) -> None:
    path = copy / "shard-000002.safetensors"
    data = path.read_bytes()
    place = data.index(answers(range(8, 12))["ids"].tobytes())
    flip(path, 8 * place)
    with pytest.raises(CacheError, match=r"shard-000002\.safetensors has other sample ids"):
        Store(copy).ids()


# Cut, moved, foreign


def cuts(path: Path) -> set[int]:
    """The start of the file, of its header and of each tensor, the end; and one byte to either side."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    places = {0, 1, 8, start, len(data)} | {
        start + place for t in header.values() for place in t.get("data_offsets", [])
    }
    return {place + step for place in places for step in (-1, 0, 1) if place + step >= 0} - {len(data)}


def test_a_shard_cut_or_extended_at_any_boundary_is_found(copy: Path) -> None:
    path = copy / "shard-000002.safetensors"
    whole = path.read_bytes()
    places = cuts(path)
    assert len(places) > 15
    for size in sorted(places):
        path.write_bytes(whole[:size].ljust(size, b"\0"))
        assert path.name in read(copy), f"{size} of {len(whole)} bytes"
    path.write_bytes(whole)
    assert read(copy) == ""


@pytest.mark.parametrize("name", ["manifest.json", "plan.json"])
def test_a_json_file_cut_anywhere_is_found(copy: Path, name: str) -> None:
    path = copy / name
    whole = path.read_bytes()
    for size in [0, 1, *range(2, len(whole) - 1, 97), len(whole) - 2]:
        path.write_bytes(whole[:size])
        assert f"{name} is damaged" in read(copy)


def rebuilt(path: Path, change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> None:
    """Rewrite a shard as a valid safetensors file with the same header, and the manifest to match it."""
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    save_file(change(load_file(path)), path, metadata=header["__metadata__"])
    index = int(path.stem.split("-")[1])
    rows = range(4 * index, min(4 * index + 4, SAMPLES))
    entry = Shard(
        path.parent, index, rows, RECORD, int(json.loads(header["__metadata__"]["e2kd"])["cache"], 16)
    ).entry()
    reseal(path.parent / "manifest.json", lambda manifest: manifest["shards"].__setitem__(index, entry))


def test_reordered_rows_are_found_even_with_a_manifest_to_match(copy: Path) -> None:
    order = [1, 0, 2, 3]
    rebuilt(copy / "shard-000002.safetensors", lambda t: {k: np.ascontiguousarray(v[order]) for k, v in t.items()})
    assert "shard-000002.safetensors is damaged at row 8" in read(copy)


def test_rewriting_alone_is_harmless(copy: Path) -> None:
    rebuilt(copy / "shard-000002.safetensors", lambda tensors: tensors)
    assert read(copy) == ""


@pytest.mark.parametrize("name", ["logits", "maps", "scales", "classes", "ids"])
def test_rows_with_another_rows_field_are_found(copy: Path, name: str) -> None:
    def mix(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return tensors | {name: np.ascontiguousarray(tensors[name][::-1])}

    rebuilt(copy / "shard-000002.safetensors", mix)
    assert "shard-000002.safetensors is damaged at row" in read(copy)


def test_swapped_shards_are_found(copy: Path) -> None:
    a, b = copy / shard_name(3), copy / shard_name(5)
    spare = copy / "spare"
    a.rename(spare), b.rename(a), spare.rename(b)
    assert "shard-000003.safetensors is shard 5 under another name" in read(copy)


def test_a_shard_in_two_places_is_found(copy: Path) -> None:
    shutil.copy(copy / shard_name(3), copy / shard_name(4))
    assert "shard-000004.safetensors is shard 3 under another name" in read(copy)


def test_a_shard_of_another_cache_is_found(copy: Path, tmp_path: Path) -> None:
    write(tmp_path / "other", plan=settings(teacher={"name": "net", "weights": "cd"}))
    assert (tmp_path / "other" / shard_name(3)).stat().st_size == (copy / shard_name(3)).stat().st_size
    shutil.copy(tmp_path / "other" / shard_name(3), copy / shard_name(3))
    assert "shard-000003.safetensors belongs to another cache" in read(copy)
    # The name alone can be forged; the rows' checksums know their cache.
    origin = json.dumps({"cache": f"{Store(copy)._cache:016x}", "shard": 3}, sort_keys=True, separators=(",", ":"))
    save_file(load_file(copy / shard_name(3)), copy / shard_name(3), metadata={"e2kd": origin})
    rebuilt(copy / shard_name(3), lambda tensors: tensors)
    assert "shard-000003.safetensors is damaged at row 12" in read(copy)


def test_a_foreign_file_is_found(copy: Path) -> None:
    tensors = load_file(copy / shard_name(0))
    save_file(tensors, copy / shard_name(0))
    assert "shard-000000.safetensors does not say which cache it belongs to" in read(copy)
    rebuilt_metadata = {"e2kd": canonical({"cache": f"{Store(copy)._cache:016x}", "shard": 0})}
    save_file(tensors | {"more": np.zeros(3)}, copy / shard_name(0), metadata=rebuilt_metadata)
    assert "shard-000000.safetensors has the tensors" in read(copy)


def test_a_valid_header_that_is_not_the_one_written_is_found(copy: Path) -> None:
    origin = {"e2kd": canonical({"cache": f"{Store(copy)._cache:016x}", "shard": 0})}
    save_file(load_file(copy / shard_name(0)), copy / shard_name(0), metadata=origin | {"note": "edited"})
    assert "shard-000000.safetensors has another header than the manifest says" in read(copy)


def test_missing_shards_are_listed_with_what_to_do(copy: Path, tmp_path: Path) -> None:
    for index in (2, 3, 5, 7, 11):
        (copy / shard_name(index)).unlink()
    said = read(copy)
    assert "lacks shard-000002.safetensors, shard-000003.safetensors" in said
    assert "and 1 more" in said
    (copy / "manifest.json").unlink()
    said = read(copy)
    assert "(5 of 12 shards) are missing" in said
    assert "freeze has not finished" in said
    assert "merge" in said
    (copy / "plan.json").unlink()
    assert "neither manifest.json nor plan.json. Was freeze run?" in read(copy)
    assert "neither" in read(tmp_path / "nowhere")


def test_a_shard_lost_while_open_is_named(copy: Path) -> None:
    store = Store(copy)
    (copy / shard_name(2)).unlink()
    with pytest.raises(CacheError, match=r"shard-000002\.safetensors is missing"):
        store.rows([9])


# Manifests that lie


@pytest.mark.parametrize("name", ["manifest.json", "plan.json"])
def test_a_later_version_says_to_upgrade(copy: Path, name: str) -> None:
    reseal(copy / name, lambda content: content.update(schema=2, unknown="future"))
    assert "version 2 of the format" in read(copy)
    assert read(copy).endswith("Upgrade e2kd.")
    for other in {"manifest.json", "plan.json"} - {name}:
        (copy / other).unlink()
    with pytest.raises(CacheError, match="Upgrade e2kd"):
        Writer(copy, settings(), RECORD)


def test_a_damaged_version_is_not_taken_for_the_future(copy: Path) -> None:
    path = copy / "manifest.json"
    path.write_text(path.read_text().replace('"schema": 1', '"schema": 9'))
    assert "or the file is damaged, for its checksum is wrong" in read(copy)


def test_no_name_in_a_manifest_becomes_a_path(copy: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.safetensors"
    shutil.copy(copy / shard_name(0), outside)
    for name in ("../outside.safetensors", str(outside)):
        reseal(copy / "manifest.json", lambda manifest, name=name: manifest["shards"][0].update(name=name))
        assert "does not describe the 12 shards" in read(copy)
    reseal(copy / "manifest.json", lambda manifest: manifest["shards"][0].pop("name"))
    reseal(copy / "manifest.json", lambda manifest: manifest.update(shard_names=["../outside.safetensors"] * 12))
    (copy / shard_name(0)).unlink()
    assert "lacks shard-000000.safetensors" in read(copy)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(shards=m["shards"][:-1]),
        lambda m: m.update(shards={}),
        lambda m: m.update(plan=None),
        lambda m: m.pop("counts"),
        lambda m: m["shards"][0].update(rows="4"),
        lambda m: m["plan"]["dataset"].update(samples=-1),
        lambda m: m["plan"].update(shard_rows=0),
        lambda m: m["plan"].update(shard_rows=True),
        lambda m: m["plan"].update(record={"num_classes": 5}),
        lambda m: m["plan"]["record"].update(map_type="../x"),
    ],
)
def test_a_sealed_manifest_of_nonsense_is_refused(copy: Path, change: Callable[[dict[str, Any]], None]) -> None:
    reseal(copy / "manifest.json", change)
    assert read(copy)


def test_a_manifest_with_another_layout_is_refused_by_the_shards(copy: Path) -> None:
    """A plan whose rows have the same bytes in another shape: the cache's fingerprint is another."""
    for name in ("manifest.json", "plan.json"):
        reseal(copy / name, lambda c: c.get("plan", c)["record"].update(map_shape=[2, 1, 3]))
    assert "belongs to another cache" in read(copy)


def test_a_plan_changed_after_the_fact_is_refused(copy: Path) -> None:
    reseal(copy / "plan.json", lambda plan: plan["teacher"].update(weights="cd"))
    assert "plan.json was changed after the cache was complete: teacher.weights is 'cd' there but 'ab' here" in read(
        copy
    )
    (copy / "plan.json").unlink()
    assert read(copy) == ""


def test_a_plan_and_manifest_changed_alike_are_refused_by_the_shards(copy: Path) -> None:
    for name in ("manifest.json", "plan.json"):
        reseal(copy / name, lambda c: c.get("plan", c)["teacher"].update(weights="cd"))
    assert "belongs to another cache" in read(copy)


# Full disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk with room for 16 small files; skipped where mounting is not allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={16 * resource.getpagesize()}", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("pages", range(1, 15))
def test_a_full_disk_keeps_what_is_finished_and_says_how_to_go_on(small_disk: Path, cache: Path, pages: int) -> None:
    """With room for none, some or all of the 14 files of a page each: the disk fills up at each of them in turn."""
    ballast, folder = small_disk / "ballast", small_disk / "cache"
    ballast.write_bytes(b"\0" * (16 - pages) * resource.getpagesize())
    if pages < 14:
        with pytest.raises(OSError, match=r"No room to write .* What was finished is kept. Free some space") as error:
            write(folder)
        assert error.value.errno == errno.ENOSPC
        assert contents(folder).items() <= contents(cache).items()  # whole files, no halves
        assert len(contents(folder)) == pages
        ballast.unlink()
    assert write(folder)
    assert contents(folder) == contents(cache)


def limited(folder: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))
    try:
        write(folder, record=Record(1000))
    except OSError as error:
        os._exit(3 if "No room to write" in str(error) else 4)


def test_a_file_that_may_not_grow_is_removed(processes: Any, tmp_path: Path) -> None:
    process = start(processes, tmp_path, target=limited)
    process.join()
    assert process.exitcode == 3
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


# Data loaders


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_read_right_rows(cache: Path, method: str) -> None:
    store = Store(cache)
    assert same(store.rows(EVERYTHING), RIGHT)  # so that there are maps to inherit
    loader = DataLoader(Reading(store), 5, shuffle=True, num_workers=2, multiprocessing_context=method)
    rows, right = (torch.cat(found) for found in zip(*loader, strict=True))
    assert sorted(rows.tolist()) == list(EVERYTHING)
    assert right.all()


def refrozen(folder: Path) -> None:
    """Freeze anew with another teacher, in place of what was there."""
    shutil.rmtree(folder)
    assert write(folder, plan=settings(teacher={"name": "net", "weights": "cd"}))


def test_a_cache_frozen_anew_underneath_is_noticed(copy: Path) -> None:
    store = Store(copy)
    store.rows(EVERYTHING)
    store.ids()
    refrozen(copy)
    for act in (lambda: store.rows([3]), store.ids, store.check):
        with pytest.raises(CacheError, match="removed or frozen anew since it was opened"):
            act()
    shutil.rmtree(copy)
    with pytest.raises(CacheError, match="removed or frozen anew"):
        store.rows([3])


def test_persistent_workers_notice_as_well(copy: Path) -> None:
    loader = DataLoader(Reading(Store(copy)), 5, num_workers=2, persistent_workers=True, multiprocessing_context="fork")
    assert all(right.all() for _, right in loader)
    refrozen(copy)
    with pytest.raises(CacheError, match="removed or frozen anew"):
        list(loader)


def test_a_repaired_cache_goes_on_being_read(copy: Path) -> None:
    store = Store(copy)
    store.rows(EVERYTHING)
    spoil(copy / shard_name(1))
    with pytest.warns(UserWarning, match="computed again"):
        assert write(copy)
    (copy / "manifest.json").touch()
    assert same(store.rows(EVERYTHING), RIGHT)
