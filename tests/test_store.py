from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusepress.pipeline.errors import StoreError
from fusepress.pipeline.store import (
    KeyParts,
    Store,
    atomic_write_text,
    content_key,
    disk_error,
    folder_lock,
    place,
    sha256_tree,
)

PARTS = KeyParts(
    stage="prune",
    version=3,
    config={"macs": 0.4, "keep": ["head"]},
    inputs={"weights": "ab" * 32},
    task_sha256="cd" * 32,
    fingerprints={"train": "t"},
    tools={"torch": "2.13.0"},
    threads=2,
)


def test_the_key_of_known_parts_is_the_golden_one() -> None:
    assert content_key(PARTS) == "dd4b901c8b0485ec433d550fb5a0893841aed53521fd8777fe3d2f9c19fc6d23"


@pytest.mark.parametrize(
    "changed",
    [
        replace(PARTS, stage="score"),
        replace(PARTS, version=4),
        replace(PARTS, config={"macs": 0.5, "keep": ["head"]}),
        replace(PARTS, inputs={"weights": "ac" * 32}),
        replace(PARTS, task_sha256="ce" * 32),
        replace(PARTS, fingerprints={"train": "u"}),
        replace(PARTS, tools={"torch": "2.13.1"}),
        replace(PARTS, threads=4),
        replace(PARTS, threads=None),
    ],
)
def test_every_part_changes_the_key(changed: KeyParts) -> None:
    assert content_key(changed) != content_key(PARTS)


@given(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=5))
def test_the_order_of_configuration_keys_does_not_matter(config: dict[str, int | str]) -> None:
    backwards = dict(reversed(list(config.items())))
    assert content_key(replace(PARTS, config=config)) == content_key(replace(PARTS, config=backwards))


def _commit(store: Store, key: str, text: str = "hello") -> None:
    aside = store.root / "aside-1"
    (aside / "deep").mkdir(parents=True)
    (aside / "a.txt").write_text(text)
    (aside / "deep" / "b.bin").write_bytes(b"\0\1")
    store.commit(key, aside, {"artifacts": {"a": "a.txt"}})


def test_a_committed_result_is_read_back_whole(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    assert store.get("k") is None
    _commit(store, "k")
    entry = store.get("k")
    assert entry is not None
    assert set(entry.files) == {"a.txt", "deep/b.bin"}
    assert entry.payload == {"artifacts": {"a": "a.txt"}}
    place(entry, tmp_path / "run" / "stage")
    assert (tmp_path / "run" / "stage" / "deep" / "b.bin").read_bytes() == b"\0\1"


@pytest.mark.parametrize("damage", ["content", "missing", "manifest"])
def test_a_damaged_result_is_told_removed_and_absent(tmp_path: Path, damage: str) -> None:
    store = Store(tmp_path)
    _commit(store, "k")
    victim = tmp_path / "k" / ("stage.json" if damage == "manifest" else "a.txt")
    if damage == "missing":
        victim.unlink()
    else:
        victim.write_text("{}" if damage == "manifest" else "hellp")
    told: list[str] = []
    assert store.get("k", told.append) is None
    assert "damaged" in told[0]
    assert not (tmp_path / "k").exists()


def test_any_changed_byte_of_a_result_is_found_and_the_file_named(tmp_path: Path) -> None:
    """Of the manifest too: it holds the figures that gates judge."""
    store = Store(tmp_path)
    _commit(store, "k")
    whole = {p.relative_to(tmp_path / "k"): p.read_bytes() for p in (tmp_path / "k").rglob("*") if p.is_file()}
    for name, content in whole.items():
        for place_of in range(len(content)):
            damaged = bytearray(content)
            damaged[place_of] ^= 0x04
            (tmp_path / "k" / name).write_bytes(damaged)
            told: list[str] = []
            if store.get("k", told.append) is not None:
                assert json.loads(damaged) == json.loads(content), "but for its spaces"
                (tmp_path / "k" / name).write_bytes(content)
                continue
            assert f"({name}" in told[0]
            _commit(store, "k")


def test_a_manifest_of_before_is_still_read_and_none_can_pass_for_one(tmp_path: Path) -> None:
    store = Store(tmp_path)
    _commit(store, "k")
    path = tmp_path / "k" / "stage.json"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps({**stored, "schema": 1}))
    assert store.get("k") is None
    _commit(store, "k")
    del stored["sha256"]
    path.write_text(json.dumps({**stored, "schema": 1}))
    assert store.get("k") is not None


def test_a_payload_whose_keys_are_numbers_is_read_back(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.commit("k", store.aside("k"), {"details": {10: "ten", 2: ("two", 0.1)}})
    entry = store.get("k")
    assert entry is not None
    assert entry.payload == {"details": {"10": "ten", "2": ["two", 0.1]}}


def test_a_result_that_is_made_again_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for text in ("one", "two"):
        _commit(store, "k", text)
    assert (tmp_path / "k/a.txt").read_text() == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["k"]


def test_what_dead_processes_left_goes_and_what_others_make_stays(tmp_path: Path) -> None:
    """Whatever the clock says: a folder from the year 2100 goes, one of 1990 whose key is held stays."""
    store = Store(tmp_path)
    dead, alive = store.aside("dead"), store.aside("alive")
    os.utime(dead, (4_102_444_800, 4_102_444_800))
    os.utime(alive, (631_152_000, 631_152_000))
    with store.locked("alive"):
        store.forget_asides()
        assert [dead.exists(), alive.exists()] == [False, True]
    store.forget_asides()
    assert not alive.exists()


def test_what_a_process_left_that_was_killed_while_placing_goes(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    _commit(store, "k")
    entry = store.get("k")
    assert entry is not None
    (tmp_path / ".stage.0123abcd").mkdir()
    place(entry, tmp_path / "stage")
    assert {p.name for p in tmp_path.iterdir()} == {"store", "stage"}


def test_placing_again_restores_what_was_changed_in_the_run_folder(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    _commit(store, "k")
    entry = store.get("k")
    assert entry is not None
    folder = tmp_path / "stage"
    place(entry, folder)
    (folder / "a.txt").write_text("edited")
    (folder / "extra").write_text("left over")
    place(entry, folder)
    assert (folder / "a.txt").read_text() == "hello"
    assert not (folder / "extra").exists()


def test_a_write_that_fails_leaves_the_old_file_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.json"
    atomic_write_text(path, "old")

    def full(self: Path, target: Path) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(StoreError, match=r"full disk .* free some space"):
        atomic_write_text(path, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]
    assert path.read_text() == "old"


def test_an_unwritable_folder_says_so() -> None:
    error = disk_error(OSError(errno.EACCES, "Permission denied"), Path("runs/a/run.json"))
    assert "Permission denied" in str(error)
    assert "writable" in str(error)


HOLD = """
import sys
from pathlib import Path
from fusepress.pipeline.store import folder_lock
with folder_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_two_processes_cannot_hold_one_folder_and_death_frees_it(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with (
            pytest.raises(StoreError, match=rf"process {process.pid} at work .* --run"),
            folder_lock(tmp_path),
        ):
            pass
        process.kill()
    with folder_lock(tmp_path):
        pass


def test_the_hash_of_a_folder_sees_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    first = sha256_tree(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    second = sha256_tree(tmp_path)
    (tmp_path / "b").write_text("2")
    assert len({first, second, sha256_tree(tmp_path)}) == 3


def test_the_manifest_names_its_key(tmp_path: Path) -> None:
    store = Store(tmp_path)
    _commit(store, "k")
    assert json.loads((tmp_path / "k" / "stage.json").read_text())["key"] == "k"
