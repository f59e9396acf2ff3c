"""The runner in two processes, with small real stages: who runs what, who writes, what run.json says of a failure."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusepress.pipeline import distributed
from fusepress.pipeline.errors import FusepressError
from fusepress.pipeline.evidence import Measurement, read_run
from fusepress.pipeline.runner import follow_stages, run_stages
from fusepress.pipeline.stages.base import Context, StageOutput
from fusepress.pipeline.store import KeyParts
from tests.ranks import run_ranks, start_ranks
from tests.test_runner import _context, _record


@dataclass
class Roll:
    """Writes down which ranks it was run by, and which artifact it read."""

    name: str
    every_rank: bool
    reads: str | None = None
    skipped: str | None = None
    fails_on: int | None = None
    version: int = 1
    ran: list[list[Any]] = field(default_factory=list)

    def skip(self, ctx: Context) -> str | None:
        return self.skipped

    def key_parts(self, ctx: Context) -> KeyParts:
        inputs = {self.reads: ctx.shas[self.reads]} if self.reads else {}
        return KeyParts(stage=self.name, version=self.version, inputs=inputs)

    def run(self, ctx: Context, out: Path, work: Path) -> StageOutput:
        if self.fails_on == distributed.rank():
            raise ValueError("no such thing")
        read = ctx.artifacts[self.reads].read_text() if self.reads else ""
        ranks = distributed.gather_objects(distributed.rank())
        self.ran.append([distributed.world(), out.parent.name, work.parent.parent.name, read])
        (out / "text.txt").write_text(f"{read}{self.name} by {ranks} ")
        (out / f"{distributed.rank()}.txt").write_text("of one rank")
        rows = [Measurement(name="accuracy.ranks", value=len(ranks), kind="measured")]
        return StageOutput(measurements=rows, artifacts={f"text_{self.name}": "text.txt"})

    def assess(self, ctx: Context, folder: Path) -> list[Measurement]:
        return [Measurement(name="latency.mean_ms", value=float(distributed.world()), unit="ms", kind="measured")]


def _share(stages: list[Roll], folder: Path) -> Context:
    ctx = _context()
    if distributed.is_main():
        run_stages(ctx, stages, _record(), folder)
    else:
        follow_stages(ctx, stages, folder)
    return ctx


def lead_and_follow(folder: str) -> dict[str, Any]:
    """The same three stages twice, in two run folders beside one store."""
    found = {}
    for name in ("first", "again"):
        stages = [
            Roll("shared", every_rank=True),
            Roll("absent", every_rank=True, skipped="not in the recipe"),
            Roll("single", every_rank=False, reads="text_shared"),
            Roll("last", every_rank=True, reads="text_single"),
        ]
        ctx = _share(stages, Path(folder) / name)
        found[name] = {
            "ran": {stage.name: stage.ran for stage in stages},
            "artifacts": {key: [path.read_text(), ctx.shas[key]] for key, path in ctx.artifacts.items()},
        }
    return found


def test_rank_0_leads_and_the_others_follow_its_files(tmp_path: Path) -> None:
    lead, follower = run_ranks("tests.test_distributed_runner:lead_and_follow", folder=str(tmp_path))
    assert lead["first"]["artifacts"] == follower["first"]["artifacts"] == lead["again"]["artifacts"]
    assert lead["again"]["artifacts"] == follower["again"]["artifacts"]
    shared, single = "shared by [0, 1] ", "shared by [0, 1] single by [0] "
    assert lead["first"]["artifacts"]["text_last"][0] == f"{single}last by [0, 1] "
    assert lead["first"]["ran"] == {
        "shared": [[2, ".store", ".store", ""]],
        "absent": [],
        "single": [[1, ".store", ".store", shared]],
        "last": [[2, ".store", ".store", single]],
    }
    followed = follower["first"]["ran"]
    assert followed["single"] == followed["absent"] == []
    (world, place, work, read) = followed["last"][0]
    assert (world, work, read) == (2, ".store", single)
    assert place != ".store"  # a folder of its own
    assert not any(lead["again"]["ran"].values())
    assert not any(follower["again"]["ran"].values())
    assert sorted(p.name for p in (tmp_path / "first/shared").iterdir()) == ["0.txt", "text.txt"]
    record = read_run(tmp_path / "first")
    assert [stage.status for stage in record.stages] == ["done", "skipped", "done", "done"]
    assert {m.value for stage in record.stages for m in stage.measurements if m.name == "latency.mean_ms"} == {1.0}


def fail(folder: str, who: int) -> None:
    """A second stage that raises on one rank."""
    try:
        with distributed.session():
            _share([Roll("shared", every_rank=True), Roll("broken", every_rank=True, fails_on=who)], Path(folder))
    except FusepressError as error:
        sys.stdout.write(json.dumps([type(error).__name__, str(error)]) + "\n")
        sys.exit(error.exit_code)


def test_what_fails_on_another_rank_is_in_run_json_with_its_traceback(tmp_path: Path) -> None:
    script = f"from tests.test_distributed_runner import fail; fail({str(tmp_path / 'r')!r}, 1)"
    processes = start_ranks([["-c", script]] * 2)
    told = [json.loads(process.communicate(timeout=100)[0].splitlines()[-1]) for process in processes]
    assert [process.returncode for process in processes] == [5, 5]
    assert told[0][0] == "RankError"
    assert told[1] == ["StageError", "ValueError: no such thing at stage broken"]
    stage = read_run(tmp_path / "r").stages[1]
    assert (stage.name, stage.status) == ("broken", "failed")
    assert "error at rank 1: ValueError: no such thing at stage broken" in str(stage.why)
    assert 'raise ValueError("no such thing")' in (tmp_path / "r/log.txt").read_text()
    assert read_run(tmp_path / "r").stages[0].status == "done"
    assert not (tmp_path / "r/broken").exists()
    assert not list((tmp_path / ".store").glob("aside-*"))
