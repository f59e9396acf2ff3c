"""The stage store: content keys, atomic commits, verified reads, locks.

A stage's outputs live under `STORE/<key>/`, written aside and renamed when complete. The key says everything that
shapes the bytes (never time, host or path), so the same key is the same result, in any run folder beside the store.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from fusepress.pipeline.errors import StoreError

MANIFEST = "stage.json"
KEY_SCHEMA = 1
MANIFEST_SCHEMA = 2  # 1 had no hash of its own, and is still read


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyParts:
    """What a stage's result depends on.

    Attributes:
        stage: its name.
        version: raised when the stage's code changes what it writes.
        config: the part of the recipe (and of the target) that the stage reads.
        inputs: artifact name -> sha256.
        task_sha256: hash of the user's task sources.
        fingerprints: split -> what identifies its data.
        tools: package -> version, of the tools that shape the bytes.
        threads: thread count where it trains or sums, else None.
    """

    stage: str
    version: int
    config: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    task_sha256: str = ""
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    tools: Mapping[str, str] = field(default_factory=dict)
    threads: int | None = None


def content_key(parts: KeyParts) -> str:
    """The key of a stage result: sha256 over a canonical, tagged encoding of its parts."""
    tagged = {
        "schema": KEY_SCHEMA,
        "stage": parts.stage,
        "version": parts.version,
        "config": parts.config,
        "inputs": dict(parts.inputs),
        "task": parts.task_sha256,
        "fingerprints": dict(parts.fingerprints),
        "tools": dict(parts.tools),
        "threads": parts.threads,
    }
    text = json.dumps(tagged, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_tree(path: Path) -> str:
    """sha256 of a file, or of a folder's relative names and contents."""
    if path.is_file():
        return sha256_file(path)
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(file.relative_to(path).as_posix().encode() + b"\0" + sha256_file(file).encode())
    return digest.hexdigest()


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part.

    Raises:
        StoreError: the disk is full or the folder is not writable.
    """
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise disk_error(error, path) from error


def atomic_write_text(path: Path, text: str) -> None:
    """`atomic_write_bytes` of UTF-8 text."""
    atomic_write_bytes(path, text.encode())


def disk_error(error: OSError, path: Path) -> StoreError:
    """An operating system error as a message that says what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return StoreError(
            f"expected room for {path.name}; got a full disk at {path.parent}; free some space and run the same "
            "command again: finished stages are kept"
        )
    return StoreError(
        f"expected to write {path.name}; got {error.strerror} at {path.parent}; check that the folder is writable"
    )


@contextlib.contextmanager
def folder_lock(folder: Path, *, wait: bool = False, purpose: str = "run") -> Iterator[None]:
    """Hold an exclusive lock on a folder; the operating system drops it when the process dies.

    Raises:
        StoreError: another process holds it and `wait` is false, or the folder is not writable.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / ".lock").open("a+b", buffering=0)
    except OSError as error:
        raise disk_error(error, folder / ".lock") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            handle.seek(0)
            owner = handle.read().decode(errors="replace").strip() or "another process"
            raise StoreError(
                f"expected to be alone in the {purpose} folder; got {owner} at work in {folder}; wait for it, or "
                "give this run another folder with --run"
            ) from error
        _name_owner(handle, f"process {os.getpid()}")
        try:
            yield
        finally:
            _name_owner(handle, "")


def _name_owner(handle: IO[bytes], owner: str) -> None:
    with contextlib.suppress(OSError):  # the lock holds without its holder's name, which a full disk has no room for
        handle.truncate(0)
        handle.write(owner.encode())


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One verified stage result in the store.

    Attributes:
        path: its folder.
        files: relative name -> sha256.
        payload: what the stage put into its manifest (record, artifact names).
    """

    path: Path
    files: dict[str, str]
    payload: dict[str, Any]


class Store:
    """Stage results by content key."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def entry_path(self, key: str) -> Path:
        """Where the result of a key lies."""
        return self.root / key

    def get(self, key: str, warn: Callable[[str], None] = lambda _: None) -> Entry | None:
        """The verified result of a key; a damaged one is removed, told by the file and counts as absent."""
        path = self.entry_path(key)
        if not (path / MANIFEST).is_file():
            return None
        try:
            stored = _read_manifest(path / MANIFEST, key)
        except (OSError, ValueError, RecursionError) as error:
            self._drop(key, f"{MANIFEST}: {error}", warn)
            return None
        files: dict[str, str] = stored["files"]
        wrong = next((name for name, sha in files.items() if not _intact(path / name, sha)), None)
        if wrong is not None:
            self._drop(key, wrong, warn)
            return None
        return Entry(path=path, files=files, payload=stored["payload"])

    def _drop(self, key: str, what: str, warn: Callable[[str], None]) -> None:
        warn(f"the stored result {key[:12]} is damaged ({what}); it is removed and made again")
        shutil.rmtree(self.entry_path(key), ignore_errors=True)

    def aside(self, key: str) -> Path:
        """A new folder for the outputs of a key, which its holder alone makes (see `locked`).

        Raises:
            StoreError: the store is not writable.
        """
        path = self.root / f"aside-{key}-{uuid.uuid4().hex[:8]}"
        try:
            path.mkdir(parents=True)
        except OSError as error:
            raise disk_error(error, path) from error
        return path

    def work_path(self, key: str) -> Path:
        """Where the folder for an unfinished stage lies."""
        return self.root / "work" / key

    def work_folder(self, key: str) -> Path:
        """A folder for an unfinished stage; it survives a killed process, so that the stage can resume."""
        path = self.work_path(key)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(error, path) from error
        return path

    @contextlib.contextmanager
    def locked(self, key: str) -> Iterator[None]:
        """Hold a key, waiting for another run that makes the same result."""
        with folder_lock(self.root / "locks" / key, wait=True, purpose="store"):
            yield

    def commit(self, key: str, outputs: Path, payload: Mapping[str, Any]) -> Entry:
        """Make `outputs` (a folder beside the store's entries) the result of a key, in one rename."""
        files = {
            p.relative_to(outputs).as_posix(): sha256_file(p)
            for p in sorted(outputs.rglob("*"))
            if p.is_file() and p.name != MANIFEST
        }
        body = {"schema": MANIFEST_SCHEMA, "key": key, "files": files, "payload": payload}
        atomic_write_text(outputs / MANIFEST, json.dumps(body | {"sha256": _manifest_sha256(body)}, indent=1))
        path, before = self.entry_path(key), self.root / f"aside-{key}-{uuid.uuid4().hex[:8]}"
        if path.exists():
            path.rename(before)  # whoever is killed here has lost one result, and not half a folder of it
        outputs.rename(path)
        shutil.rmtree(before, ignore_errors=True)
        return Entry(path=path, files=files, payload=dict(payload))

    def discard_work(self, key: str) -> None:
        """Remove the work folder of a finished stage."""
        shutil.rmtree(self.work_path(key), ignore_errors=True)

    def forget_asides(self) -> None:
        """Remove half-written outputs of dead processes: those of keys that nobody holds, whatever the clock says."""
        for path in self.root.glob("aside-*"):
            key = path.name.split("-")[1]
            with contextlib.suppress(StoreError), folder_lock(self.root / "locks" / key, purpose="store"):
                shutil.rmtree(path, ignore_errors=True)


def _read_manifest(path: Path, key: str) -> dict[str, Any]:
    """The manifest of a key.

    Raises:
        ValueError: it is not as it was written.
    """
    stored = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(stored, dict) or not isinstance(stored.get("files"), dict):
        raise ValueError("no manifest")
    sha256 = stored.pop("sha256", None)
    if stored.keys() != {"schema", "key", "files", "payload"} or stored["key"] != key:
        raise ValueError("the manifest of another key")
    if (stored["schema"], sha256) not in ((KEY_SCHEMA, None), (MANIFEST_SCHEMA, _manifest_sha256(stored))):
        raise ValueError("other bytes than were written")
    return stored


def _manifest_sha256(body: Mapping[str, Any]) -> str:
    read_back = json.loads(json.dumps(body))  # keys that were numbers are text then, and sort as text
    return hashlib.sha256(json.dumps(read_back, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _intact(path: Path, sha: str) -> bool:
    return path.is_file() and sha256_file(path) == sha


def place(entry: Entry, folder: Path) -> None:
    """Make `folder` hold exactly the files of a store entry; a folder that already does is left alone."""
    for left in folder.parent.glob(f".{folder.name}.*"):  # of a process that was killed here
        shutil.rmtree(left, ignore_errors=True)
    present = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} if folder.exists() else set()
    if present == set(entry.files) and all(_intact(folder / name, sha) for name, sha in entry.files.items()):
        return
    aside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    try:
        for name in entry.files:
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(entry.path / name, aside / name)
        aside.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise disk_error(error, folder) from error
