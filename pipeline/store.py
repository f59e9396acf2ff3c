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
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusepress.pipeline.errors import StoreError

MANIFEST = "stage.json"
KEY_SCHEMA = 1


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
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
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
        handle = (folder / ".lock").open("a+")
    except OSError as error:
        raise disk_error(error, folder / ".lock") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            handle.seek(0)
            owner = handle.read().strip() or "another process"
            raise StoreError(
                f"expected to be alone in the {purpose} folder; got {owner} at work in {folder}; wait for it, or "
                "give this run another folder with --run"
            ) from error
        handle.seek(0)
        handle.truncate()
        handle.write(f"process {os.getpid()}")
        handle.flush()
        try:
            yield
        finally:
            handle.seek(0)
            handle.truncate()
            handle.flush()


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
        """The verified result of a key; a damaged one is removed, told and counts as absent."""
        path = self.entry_path(key)
        manifest = path / MANIFEST
        if not manifest.is_file():
            return None
        try:
            stored = json.loads(manifest.read_text())
            files: dict[str, str] = stored["files"]
            damaged = [name for name, sha in files.items() if not _intact(path / name, sha)]
            payload = stored["payload"]
        except (ValueError, KeyError, TypeError):
            damaged, files, payload = [MANIFEST], {}, {}
        if damaged:
            warn(f"the stored result {key[:12]} is damaged ({damaged[0]}); it is removed and made again")
            shutil.rmtree(path, ignore_errors=True)
            return None
        return Entry(path=path, files=files, payload=payload)

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
        text = json.dumps({"schema": KEY_SCHEMA, "key": key, "files": files, "payload": payload}, indent=1)
        atomic_write_text(outputs / MANIFEST, text)
        path = self.entry_path(key)
        shutil.rmtree(path, ignore_errors=True)
        outputs.rename(path)
        return Entry(path=path, files=files, payload=dict(payload))

    def discard_work(self, key: str) -> None:
        """Remove the work folder of a finished stage."""
        shutil.rmtree(self.work_path(key), ignore_errors=True)

    def forget_asides(self, older_than_s: float = 86400) -> None:
        """Remove half-written outputs of processes that died long ago."""
        for path in self.root.glob("aside-*"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > older_than_s:
                    shutil.rmtree(path, ignore_errors=True)


def _intact(path: Path, sha: str) -> bool:
    return path.is_file() and sha256_file(path) == sha


def place(entry: Entry, folder: Path) -> None:
    """Make `folder` hold exactly the files of a store entry; a folder that already does is left alone."""
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
