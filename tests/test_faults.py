"""The runner under faults, with small real stages in processes of their own; benchmarks/faults takes whole runs."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from fusepress.pipeline.console import Reporter
from fusepress.pipeline.errors import FusepressError
from fusepress.pipeline.evidence import RUN_JSON, Measurement, RunRecord, read_run
from fusepress.pipeline.runner import run_stages
from fusepress.pipeline.stages.base import Context, StageOutput
from fusepress.pipeline.store import KeyParts, Store, atomic_write_text, sha256_tree

NAMES = ("first", "second", "third")


class Slow:
    """Writes ten files, slowly, of what the stage before it wrote, and goes on where it was stopped."""

    version, every_rank = 1, False

    def __init__(self, name: str, before: str | None) -> None:
        self.name, self.before = name, before

    def skip(self, ctx: Context) -> None:
        return None

    def key_parts(self, ctx: Context) -> KeyParts:
        inputs = {self.before: ctx.shas[self.before]} if self.before else {}
        return KeyParts(stage=self.name, version=1, inputs=inputs)

    def run(self, ctx: Context, out: Path, work: Path) -> StageOutput:
        text = ctx.artifacts[self.before].read_text() if self.before else "start"
        for number in range(10):
            time.sleep(0.004)
            done = work / f"{number}.txt"
            if not done.exists():
                atomic_write_text(done, hashlib.sha256(f"{text} {number}".encode()).hexdigest())
            (out / f"{number}.txt").write_text(done.read_text())
        (out / "all.txt").write_text("".join((out / f"{number}.txt").read_text() for number in range(10)))
        rows = [Measurement(name="accuracy.words", value=float(len(text)), kind="measured")]
        return StageOutput(measurements=rows, artifacts={self.name: "all.txt"})

    def assess(self, ctx: Context, folder: Path) -> list[Measurement]:
        time.sleep(0.004)
        return [Measurement(name="latency.mean_ms", value=1.0, unit="ms", kind="predicted")]


def _run(run: Path) -> int:
    facts: dict[str, Any] = {"name": "r", "fusepress": "0", "target": "t", "seed": 0}
    hashes: dict[str, Any] = dict.fromkeys(["recipe_sha256", "task_sha256", "checkpoint_sha256"], "")
    fields: dict[str, Any] = {"artifacts": {}, "shas": {}, "reporter": Reporter(quiet=True), "final_precision": "fp16"}
    context = SimpleNamespace(**fields, target_identity=lambda: {"name": "target"})

    def add_artifact(name: str, path: Path, sha256: str) -> None:
        context.artifacts[name], context.shas[name] = path, sha256

    context.add_artifact = add_artifact
    stages = [Slow(name, before) for name, before in zip(NAMES, (None, *NAMES), strict=False)]
    try:
        run_stages(cast("Context", context), stages, RunRecord(schema=1, **facts, **hashes), run)
    except FusepressError as error:
        run.with_name(f"{run.name}.said").write_text(str(error))
        return error.exit_code
    return 0


def _start(run: Path) -> int:
    """A process at work on a run: a fork, for a new interpreter takes seconds to import."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads, which wait and hold nothing
        process = os.fork()
    if process == 0:
        code = 70
        try:
            code = _run(run)
        finally:
            os._exit(code)
    return process


def _end(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def _whole(run: Path) -> tuple[int, str]:
    code, said = _end(_start(run)), run.with_name(f"{run.name}.said")
    return code, said.read_text() if said.exists() else ""


def _result(run: Path) -> list[str]:
    return [sha256_tree(run / name) for name in NAMES]


def _committed(run: Path) -> set[str]:
    """Keys in the store; each result is whole."""
    store, found = Store(run.parent / ".store"), set()
    for path in store.root.glob("*/stage.json"):
        told: list[str] = []
        assert store.get(path.parent.name, told.append) is not None, told
        found.add(path.parent.name)
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    run = tmp_path_factory.mktemp("whole") / "run"
    assert _whole(run) == (0, "")
    assert {stage.status for stage in read_run(run).stages} == {"done"}
    return _result(run)


def test_a_run_that_is_killed_again_and_again_ends_as_if_nothing_had_been(
    undisturbed: list[str], tmp_path: Path
) -> None:
    """Whenever it is killed: run.json can be read, what was committed is there and whole, and the end is the same."""
    generator, run = random.Random(0), tmp_path / "run"
    kept: set[str] = set()
    for _ in range(12):
        process = _start(run)
        time.sleep(generator.uniform(0, 0.12))
        os.kill(process, signal.SIGKILL)
        _end(process)
        if (run / RUN_JSON).exists():
            read_run(run)
        now = _committed(run)
        assert kept <= now
        kept = now
    assert _whole(run) == (0, "")
    assert _result(run) == undisturbed
    left = [p.name for p in (run.parent / ".store").iterdir() if p.name.startswith("aside-")]
    assert not left
    assert not [p.name for p in run.iterdir() if p.name.startswith(".") and p.name != ".lock"]


def test_a_second_process_on_one_run_folder_is_refused_and_the_first_goes_on(
    undisturbed: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    first = _start(run)
    while not (run / RUN_JSON).exists():
        time.sleep(0.001)
    os.kill(first, signal.SIGSTOP)
    code, said = _whole(run)
    os.kill(first, signal.SIGCONT)
    assert (code, f"expected to be alone in the run folder; got process {first} at work in" in said) == (5, True)
    assert _end(first) == 0
    assert _result(run) == undisturbed


def test_two_runs_that_share_a_store_come_to_the_same(undisturbed: list[str], tmp_path: Path) -> None:
    runs = [tmp_path / name for name in ("one", "two")]
    processes = [_start(run) for run in runs]
    assert [_end(process) for process in processes] == [0, 0]
    assert [_result(run) for run in runs] == [undisturbed, undisturbed]


def test_a_store_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    """A file in the place of the store's folder stops every user, root too, whom permissions do not."""
    (tmp_path / ".store").write_text("no folder")
    code, said = _whole(tmp_path / "run")
    assert code == 5
    assert "expected to write" in said


def test_dates_of_any_year_change_nothing(undisturbed: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    _whole(run)
    for year, path in enumerate(sorted(tmp_path.rglob("*"))):
        os.utime(path, (year * 1e8, year * 1e8))
    assert _whole(run) == (0, "")
    assert {stage.status for stage in read_run(run).stages} == {"cached"}
    assert _result(run) == undisturbed
