"""The runner with small real stages: reuse, resume, failure, interruption, damage."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from fusepress.pipeline.console import Reporter
from fusepress.pipeline.errors import BuildError, StageError, StoreError, UsageError
from fusepress.pipeline.evidence import Measurement, RunRecord, read_run
from fusepress.pipeline.runner import Interrupted, run_stages
from fusepress.pipeline.stages.base import Context, StageOutput
from fusepress.pipeline.store import KeyParts, folder_lock
from fusepress.targets import roofline
from fusepress.targets.profile import LatencyFit, Profile, load_profile

if TYPE_CHECKING:
    from fusepress.pipeline.recipe import LoadedRecipe
    from fusepress.pipeline.task import LoadedTask


@dataclass
class WriteStage:
    """Writes one file, made of its own word and of its input artifact."""

    name: str
    word: str
    reads: str | None = None
    version: int = 1
    every_rank: bool = False
    skipped: str | None = None
    calls: list[Path] = field(default_factory=list)
    timed: int = 0
    trouble: Callable[[Path], None] | None = None

    def skip(self, ctx: Context) -> str | None:
        return self.skipped

    def key_parts(self, ctx: Context) -> KeyParts:
        inputs = {self.reads: ctx.shas[self.reads]} if self.reads else {}
        return KeyParts(stage=self.name, version=self.version, config={"word": self.word}, inputs=inputs)

    def run(self, ctx: Context, out: Path, work: Path) -> StageOutput:
        self.calls.append(work)
        before = ctx.artifacts[self.reads].read_text() if self.reads else ""
        (out / "text.txt").write_text(before + self.word)
        if self.trouble is not None:
            self.trouble(work)
        rows = [Measurement(name="accuracy.words", value=float(len(before + self.word)), kind="measured")]
        return StageOutput(measurements=rows, artifacts={f"text_{self.name}": "text.txt"})

    def assess(self, ctx: Context, folder: Path) -> list[Measurement]:
        if ctx.target_identity()["name"] == "untimed":
            return []
        self.timed += 1
        return [Measurement(name="latency.mean_ms", value=1.0, unit="ms", kind="measured")]


def _context(target: str = "untimed") -> Context:
    fields: dict[str, Any] = {"artifacts": {}, "shas": {}, "reporter": Reporter(quiet=True), "final_precision": "fp16"}
    fields["target_identity"] = lambda: {"name": target}
    context = SimpleNamespace(**fields)

    def add_artifact(name: str, path: Path, sha256: str) -> None:
        context.artifacts[name], context.shas[name] = path, sha256

    context.add_artifact = add_artifact
    return cast("Context", context)


def _record() -> RunRecord:
    return RunRecord(
        schema=1,
        name="r",
        fusepress="0",
        target="host-cpu",
        recipe_sha256="",
        task_sha256="",
        checkpoint_sha256="",
        seed=0,
    )


def _stages(first: str = "one ", second: str = "two") -> list[WriteStage]:
    return [WriteStage("first", first), WriteStage("second", second, reads="text_first")]


def _run(folder: Path, stages: list[WriteStage], target: str = "untimed", **options: Any) -> tuple[RunRecord, bool]:
    record = _record()
    worked = run_stages(_context(target), stages, record, folder, **options)
    return record, worked


def _status(folder: Path) -> dict[str, str]:
    return {stage.name: stage.status for stage in read_run(folder).stages}


def test_stages_run_in_order_and_run_json_tells_it(tmp_path: Path) -> None:
    record, worked = _run(tmp_path / "r", _stages())
    assert worked
    assert (tmp_path / "r/second/text.txt").read_text() == "one two"
    assert _status(tmp_path / "r") == {"first": "done", "second": "done"}
    assert [m.value for stage in record.stages for m in stage.measurements] == [4, 7]


def test_a_second_run_does_nothing_even_in_another_folder(tmp_path: Path) -> None:
    _run(tmp_path / "r", _stages())
    again = _stages()
    record, worked = _run(tmp_path / "other", again)
    assert not worked
    assert not any(stage.calls for stage in again)
    assert (tmp_path / "other/second/text.txt").read_text() == "one two"
    assert [stage.status for stage in record.stages] == ["cached", "cached"]


def test_a_changed_stage_and_what_reads_it_run_again(tmp_path: Path) -> None:
    _run(tmp_path / "r", _stages())
    changed = _stages(second="three")
    _run(tmp_path / "r", changed)
    assert [bool(stage.calls) for stage in changed] == [False, True]
    changed = _stages(first="uno ")
    _run(tmp_path / "r", changed)
    assert [bool(stage.calls) for stage in changed] == [True, True]
    assert (tmp_path / "r/second/text.txt").read_text() == "uno two"


def test_from_makes_a_stage_and_all_later_ones_anew(tmp_path: Path) -> None:
    _run(tmp_path / "r", _stages())
    again = _stages()
    _run(tmp_path / "r", again, from_stage="second")
    assert [bool(stage.calls) for stage in again] == [False, True]
    with pytest.raises(UsageError, match="expected --from to name a stage; got 'third'; the stages are first, second"):
        _run(tmp_path / "r", _stages(), from_stage="third")


def _die(_work: Path) -> None:
    raise BuildError("expected an engine; got a fault at layer 3; do this")


def _bug(_work: Path) -> None:
    raise ZeroDivisionError("division by zero")


def _stop(_work: Path) -> None:
    raise KeyboardInterrupt


def _full(_work: Path) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("trouble", "error", "message", "status"),
    [
        (_die, BuildError, "got a fault at layer 3", "failed"),
        (_bug, StageError, r"expected stage second to finish; got ZeroDivisionError.*log\.txt", "failed"),
        (_stop, Interrupted, "interrupted in stage second; run the same command again", "interrupted"),
        (_full, StoreError, "full disk", "failed"),
    ],
)
def test_a_stage_that_stops_is_recorded_leaves_nothing_behind_and_can_be_resumed(
    tmp_path: Path, trouble: Callable[[Path], None], error: type[Exception], message: str, status: str
) -> None:
    stages = _stages()
    stages[1].trouble = trouble
    with pytest.raises(error, match=message):
        _run(tmp_path / "r", stages)
    assert _status(tmp_path / "r") == {"first": "done", "second": status}
    assert not (tmp_path / "r/second").exists()
    assert not list((tmp_path / ".store").glob("aside-*"))
    again = _stages()
    _run(tmp_path / "r", again)
    assert [bool(stage.calls) for stage in again] == [False, True]
    assert (tmp_path / "r/second/text.txt").read_text() == "one two"


def test_what_a_killed_stage_left_in_its_work_folder_is_there_when_it_resumes(tmp_path: Path) -> None:
    def save_then_stop(work: Path) -> None:
        (work / "checkpoint").write_text("step 7")
        raise KeyboardInterrupt

    stages = _stages()
    stages[0].trouble = save_then_stop
    with pytest.raises(Interrupted):
        _run(tmp_path / "r", stages)
    found: list[str] = []
    again = _stages()
    again[0].trouble = lambda work: found.append((work / "checkpoint").read_text())
    _run(tmp_path / "r", again)
    assert found == ["step 7"]
    assert not again[0].calls[0].exists()


def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    with folder_lock(tmp_path / "r"), pytest.raises(StoreError, match=r"expected to be alone .* --run"):
        _run(tmp_path / "r", _stages())


def test_a_skipped_stage_says_why_and_its_old_folder_goes(tmp_path: Path) -> None:
    _run(tmp_path / "r", _stages())
    stages = _stages()
    stages[1].skipped = "not in the recipe"
    record, _ = _run(tmp_path / "r", stages)
    assert record.stages[1].why == "not in the recipe"
    assert not (tmp_path / "r/second").exists()


def test_a_damaged_store_is_mended(tmp_path: Path) -> None:
    _run(tmp_path / "r", _stages())
    for path in (tmp_path / ".store").glob("*/text.txt"):
        path.write_text("damaged")
    again = _stages()
    _run(tmp_path / "r", again)
    assert all(stage.calls for stage in again)
    assert (tmp_path / "r/second/text.txt").read_text() == "one two"


def test_a_changed_byte_of_run_json_is_found_wherever_it_is(tmp_path: Path) -> None:
    _run(tmp_path / "r", _stages())
    path = tmp_path / "r/run.json"
    content = path.read_bytes()
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 0x01  # 4 words become 5, for one
        path.write_bytes(damaged)
        with pytest.raises(StoreError, match=r"got (other bytes|a file that does not fit) at .*run\.json"):
            read_run(tmp_path / "r")
    path.write_bytes(content)
    again = read_run(tmp_path / "r")
    assert again.to_json().encode() == content
    path.write_text("\n".join(line for line in content.decode().splitlines() if '"sha256"' not in line)[:-3] + "}")
    assert read_run(tmp_path / "r").stages == again.stages, "one of before had no hash"


def test_two_runs_that_time_the_same_model_wait_for_each_other(tmp_path: Path) -> None:
    """Both would make the same entry of the store, and one of them would find it in its way."""
    stages = [_stages(), _stages()]
    _run(tmp_path / "first", _stages())
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(_run, tmp_path / f"r{i}", stages[i], target="timed") for i in range(2)]
        assert [run.result()[0].stages[1].status for run in runs]
    assert sum(stage.timed for stage in [*stages[0], *stages[1]]) == 2, "each stage once"


def test_run_json_is_schema_1(tmp_path: Path) -> None:
    _run(tmp_path / "r", _stages())
    raw = json.loads((tmp_path / "r/run.json").read_text())
    assert raw["schema"] == 1
    assert {"name", "target", "recipe_sha256", "task_sha256", "checkpoint_sha256", "seed", "stages"} <= set(raw)
    assert {"name", "status", "seconds", "key", "measurements"} <= set(raw["stages"][0])


def test_another_target_shares_the_work_and_has_its_own_latency(tmp_path: Path) -> None:
    _run(tmp_path / "a", _stages(), target="one")
    other = _stages()
    record, worked = _run(tmp_path / "b", other, target="two")
    assert worked
    assert not any(stage.calls for stage in other)
    assert [stage.timed for stage in other] == [1, 1]
    assert [m.name for m in record.stages[0].measurements] == ["accuracy.words", "latency.mean_ms"]
    again = _stages()
    _, worked = _run(tmp_path / "b", again, target="two")
    assert not worked
    assert [stage.timed for stage in again] == [0, 0]


def test_a_target_s_identity_holds_the_constants_of_its_prediction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def identity(profile: Profile) -> dict[str, Any]:
        context = Context(
            loaded=cast("LoadedRecipe", None), task=cast("LoadedTask", None), profile=profile, power_mode=None,
            precision="fp16", checkpoint=None, checkpoint_sha256="", reporter=Reporter(quiet=True),
        )  # fmt: skip
        return context.target_identity()

    orin, host = load_profile("jetson-agx-orin-64gb"), load_profile("host-cpu")
    raw = json.loads(roofline.FITTED.read_text())["sets"]["orin"]
    own = orin.model_copy(update={"latency": LatencyFit.model_validate({**raw, "rows": 3, "command": "fit"})})
    before = [identity(profile) for profile in (orin, own, host)]
    assert before[0] != before[1]
    again = tmp_path / "latency.json"
    again.write_bytes(roofline.FITTED.read_bytes() + b"\n")
    monkeypatch.setattr(roofline, "FITTED", again)
    assert identity(orin) != before[0]
    # what one measured oneself is in the profile, and a host is measured
    assert [identity(own), identity(host)] == before[1:]
