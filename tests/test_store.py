from __future__ import annotations

import errno
import json
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
