"""All faults but kills: what is done to a run, and what must come of it.

Each fault is a function from the project and the finished, undisturbed run to a row: what was done, the exit code, what
was said, and whether the run came to the undisturbed result once the fault was gone.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.faults.project import committed, compress, finish, ran, reached, result_sha256, start, written
from fusepress.pipeline.errors import FusepressError
from fusepress.pipeline.evidence import read_run
from fusepress.pipeline.runner import STORE
from fusepress.pipeline.store import Store

NOBODY = 65534
SMALL_DISK_KIB = (64, 1500, 4000)
PAGES = ("report.html", "junit.xml", "summary.md", "explain.json")


@dataclass(frozen=True, slots=True)
class Project:
    """What faults are tried on.

    Attributes:
        recipe: of the project.
        run: the undisturbed run, with its store beside it.
        sha256: its result.
        scratch: a folder for copies.
    """

    recipe: Path
    run: Path
    sha256: str
    scratch: Path

    def copy(self, name: str, *, without: str | None = None) -> Path:
        """A copy of the finished run and its store; without the results of a stage and what follows it."""
        home = self.scratch / name
        shutil.copytree(self.run.parent, home)
        run = home / self.run.name
        if without is not None:
            stages = [stage.name for stage in read_run(run).stages]
            for stage in read_run(run).stages[stages.index(without) :]:
                shutil.rmtree(run / stage.name, ignore_errors=True)
                if stage.key is not None:
                    shutil.rmtree(home / STORE / stage.key, ignore_errors=True)
        return run

    def again(self, run: Path) -> tuple[int, bool]:
        """The same command without the fault: exit code, and whether it came to the undisturbed result."""
        code, _ = ran(compress(self.recipe, run), run.parent / "log")
        return code, result_sha256(run) == self.sha256


Row = dict[str, Any]


def _row(project: Project, run: Path, what: str, code: int, said: str, wanted: str) -> Row:
    """A fault that ended a run: it must say so, keep what was committed, and be gone when it is gone."""
    kept = committed(run) if (run.parent / STORE).is_dir() else set()
    error = next((line for line in said.splitlines() if line.startswith(("error:", "interrupted"))), said[-300:])
    error = error.replace(str(project.scratch), "...")
    after, same = project.again(run)
    lost = len(kept - committed(run))
    told = re.search(wanted, said) is not None and "Traceback" not in said
    return {"fault": what, "exit_code": code, "said": error[:300], "resumed": after, "same": same, "lost": lost} | {
        "ok": same and not lost and told and code != 0
    }


def interrupted(project: Project, number: int, name: str) -> Row:
    """SIGINT or SIGTERM while a stage trains."""
    run = project.copy(name, without="finetune")
    before = written(run)
    process = start(compress(project.recipe, run), run.parent / "log")
    reached(process, run, "finetune", before)
    os.kill(process, number)
    code = finish(process)
    said = (run.parent / "log").read_text()
    return _row(project, run, f"{name} while a stage is at work", code, said, "interrupted")


def full_disk(project: Project, name: str, kib: int) -> Row:
    """A small tmpfs in the place of the run's folder, with room for the inputs only up to some stage."""
    place = project.scratch / name
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(place)], check=True)
    try:
        run = place / "run"
        log = project.scratch / f"{name}.log"
        code, said = ran(compress(project.recipe, run), log)
        subprocess.run(["mount", "-o", "remount,size=200m", str(place)], check=True)
        return _row(project, run, f"a disk of {kib} KiB", code, said, "got a full disk")
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def small_files(project: Project, name: str, limit: int) -> Row:
    """No file may grow beyond a limit (RLIMIT_FSIZE): writes fail for real, on any system."""

    def prepare() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    run = project.scratch / name / "run"
    run.parent.mkdir()
    code, said = ran(compress(project.recipe, run), project.scratch / f"{name}.log", prepare)
    return _row(project, run, f"files of at most {limit:,} bytes", code, said, "got a full disk")


def read_only(project: Project, name: str) -> Row:
    """A run folder that another user owns."""
    run = project.copy(name, without="export")
    for folder in (project.scratch, project.scratch.parent):
        folder.chmod(0o755)

    def prepare() -> None:
        if os.geteuid() == 0:  # whom no permission stops
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)

    for path in [run, *run.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    code, said = ran(compress(project.recipe, run), project.scratch / f"{name}.log", prepare)
    for path in [run, *run.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    return _row(project, run, "a run folder that is not writable", code, said, "check that the folder is writable")


def two_at_once(project: Project, name: str) -> Row:
    """A second process on the same run folder."""
    run = project.copy(name, without="finetune")
    before = written(run)
    first = start(compress(project.recipe, run), run.parent / "log")
    reached(first, run, "finetune", before)
    code, said = ran(compress(project.recipe, run), project.scratch / f"{name}.log")
    ended = finish(first)
    row = _row(project, run, "two processes on one run folder", code, said, "expected to be alone in the run folder")
    return row | {"first": ended, "ok": row["ok"] and ended == row["resumed"]}


def two_runs(project: Project, name: str) -> Row:
    """Two runs of one recipe in two folders that share a store: both come to the same result."""
    home = project.scratch / name
    home.mkdir()
    processes = [start(compress(project.recipe, home / f"run{i}"), home / f"log{i}") for i in range(2)]
    codes = [finish(process) for process in processes]
    hashes = {result_sha256(home / f"run{i}") for i in range(2)}
    ok = hashes == {project.sha256} and len(set(codes)) == 1
    return {"fault": "two runs that share a store, at once", "exit_code": codes[0], "said": "", "same": ok, "ok": ok}


def clock(project: Project, name: str, years: int) -> Row:
    """Every file of a stopped run is from another year, past or future, and so is what a dead process left."""
    run = project.copy(name, without="export")
    left = Store(run.parent / STORE).aside("0" * 64)
    when = time.time() + years * 365.25 * 86400
    for path in [run.parent, *run.parent.rglob("*")]:
        os.utime(path, (when, when))
    code, same = project.again(run)
    ok = same and not left.exists()
    what = f"files {abs(years)} years {'ahead' if years > 0 else 'behind'}"
    return {"fault": what, "exit_code": code, "said": "", "same": same, "ok": ok}


def worker_killed(project: Project, name: str) -> Row:
    """The kernel's out-of-memory killer takes the process that a stage started."""
    run = project.copy(name, without="export")
    process = start(compress(project.recipe, run), run.parent / "log")
    taken = 0
    while os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        for child in _descendants(process):
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
                taken += 1
        time.sleep(0.2)
    code = finish(process)
    said = (run.parent / "log").read_text()
    row = _row(project, run, "the process of a stage killed as by the kernel, out of memory", code, said, "expected ")
    return row | {"taken": taken, "ok": row["ok"] and taken > 0}


def _descendants(process: int) -> list[int]:
    """Its children and theirs."""
    with contextlib.suppress(FileNotFoundError):
        text = Path(f"/proc/{process}/task/{process}/children").read_text()
        children = [int(word) for word in text.split()]
        return [*(leaf for child in children for leaf in _descendants(child)), *children]
    return []


def no_number_in_the_loss(project: Project, name: str) -> Row:
    """The task's loss is NaN from the third step on."""
    run = project.copy(name)
    task = project.recipe.parent / "nan_task.py"
    text = (project.recipe.parent / "task.py").read_text()
    where = "    def losses(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:\n"
    if where not in text:
        raise RuntimeError("expected losses() in the task of `fusepress init`; got none; correct this fault")
    count = "        self.seen = getattr(self, 'seen', 0) + torch.is_grad_enabled()\n"
    spoil = "        outputs = outputs * (float('nan') if self.seen > 2 else 1.0)\n"
    task.write_text(text.replace(where, where + count + spoil))
    other = run.parent / "nan"
    more = ("-o", "task=nan_task.py:MyTask")
    code, said = ran(compress(project.recipe, other, *more), project.scratch / f"{name}.log")
    failed = [stage.name for stage in read_run(other).stages if stage.status == "failed"]
    row = _row(project, run, "NaN in the loss", code, said, "finite")
    return row | {"failed": failed, "ok": row["ok"] and failed == ["finetune"] and not (other / "finetune").exists()}


def corrupted(project: Project, name: str) -> Iterator[Row]:
    """One flipped bit in every file of the store and of the run folder must be found, and the file named.

    Reports are left out: no gate reads them, and `fusepress report` and `explain` write them anew from the record.
    """
    run = project.copy(name)
    generator = np.random.default_rng(0)
    home = run.parent
    store = Store(home / STORE)
    for path in sorted([*store.root.rglob("*"), *run.rglob("*")]):
        relative = path.relative_to(home).as_posix()
        if not path.is_file() or path.name in (".lock", "log.txt", *PAGES):
            continue
        whole = path.read_bytes()
        if not whole:
            continue
        damaged, place = bytearray(whole), int(generator.integers(len(whole)))
        damaged[place] ^= 1 << int(generator.integers(8))
        path.write_bytes(damaged)
        if path.is_relative_to(store.root):
            key, inside = path.relative_to(store.root).as_posix().split("/", 1)
            found, told = _in_store(store, key, inside)
        else:
            inside = path.relative_to(run).as_posix()
            found, told = _in_run(run, inside)
        path.write_bytes(whole)
        yield {"fault": "a flipped bit", "file": _kind(relative), "said": told[:200], "ok": found}


def _kind(relative: str) -> str:
    """Keys are long, and the same kind of file has many."""
    return re.sub(r"[0-9a-f]{64}", "KEY", relative)


def _in_store(store: Store, key: str, name: str) -> tuple[bool, str]:
    """A damaged result is removed; it is put back here."""
    aside = store.root.parent / "aside-copy"
    shutil.copytree(store.entry_path(key), aside)
    told: list[str] = []
    found = store.get(key, told.append) is None and name in told[0]
    shutil.rmtree(store.entry_path(key), ignore_errors=True)
    aside.rename(store.entry_path(key))
    return found, told[0] if told else "nothing"


def _in_run(run: Path, name: str) -> tuple[bool, str]:
    """What judges a run, or bundles it, must not take it."""
    from fusepress.pipeline.bundling.make import make_bundle

    try:
        make_bundle(run, run.parent / "b.tar", refused=True)
    except FusepressError as error:
        return name.rpartition("/")[2] in str(error), str(error).replace(str(run), "RUN")
    finally:
        (run.parent / "b.tar").unlink(missing_ok=True)
    return False, "nothing"


def impossible(name: str) -> str | None:
    """Why a fault cannot be made on this machine."""
    return "needs root, to mount a small disk" if name.startswith("disk-") and os.geteuid() != 0 else None


FAULTS: dict[str, Callable[[Project, str], Row]] = {
    "sigint": lambda p, n: interrupted(p, signal.SIGINT, n),
    "sigterm": lambda p, n: interrupted(p, signal.SIGTERM, n),
    **{f"disk-{kib}": (lambda p, n, kib=kib: full_disk(p, n, kib)) for kib in SMALL_DISK_KIB},  # type: ignore[misc]
    "file-size": lambda p, n: small_files(p, n, 100_000),
    "read-only": read_only,
    "two-at-once": two_at_once,
    "two-runs": two_runs,
    "clock-ahead": lambda p, n: clock(p, n, 30),
    "clock-behind": lambda p, n: clock(p, n, -30),
    "worker-killed": worker_killed,
    "nan-loss": no_number_in_the_loss,
}
