"""`torchrun -m fusepress compress` with two processes: as one process, after a kill, and where it must refuse."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import save_file

from fusepress.pipeline.cli import run
from fusepress.pipeline.evidence import RunRecord, read_run
from tests.ranks import start_ranks

RECIPE: dict[str, Any] = {
    "task": "task.py:MyTask",
    "checkpoint": "dense.safetensors",
    "target": "host-cpu",
    "score": {"method": "altermoma", "beta": 1.0, "batches": 3, "reactivation_batches": 2},
    "prune": {"macs": 0.5, "align": 8, "allocation": "distortion", "distortion": {"samples": 24}},
    "finetune": {"steps": 4, "lr": 5e-4, "checkpoint_every": 1, "freeze_batchnorm": True},
    "verify": {"replicates": 200},
    "gates": {"accuracy": {"max_drop": 0.9}, "robustness": {"camera_blank": {"max_extra_drop": 0.9}}},
}
DIE = '''
import os
import signal

_CALLS = {}


def _perhaps_die(what):
    """Tests end rank 1 at a call of theirs, named in the environment."""
    _CALLS[what] = _CALLS.get(what, 0) + 1
    if os.environ.get("RANK") == "1" and os.environ.get("DIE_AT") == f"{what}:{_CALLS[what]}":
        os.kill(os.getpid(), signal.SIGKILL)
    if os.environ.get("RANK") == "1" and os.environ.get("RAISE_AT") == f"{what}:{_CALLS[what]}":
        raise ZeroDivisionError("in the user's code")


class MyTask:'''


def _project(folder: Path) -> Path:
    """The task of `fusepress init`, smaller, with an untrained checkpoint."""
    assert run(["init", str(folder)]) == 0
    text = (folder / "task.py").read_text()
    for old, new in (
        ("SIZE, CLASSES = 32", "SIZE, CLASSES = 16"),
        ('"calib": 64, "eval": 128', '"calib": 32, "eval": 80'),
        ("\nclass MyTask:", DIE),
        ('        return {"segmentation"', "        _perhaps_die('losses')\n        return {\"segmentation\""),
        (' {SIZE}".encode()', " {SIZE} {os.environ.get('DATA_OF_' + os.environ.get('RANK', ''))}\".encode()"),
        ("        predicted, label =", "        _perhaps_die('sample_stats')\n        predicted, label ="),
    ):
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (folder / "task.py").write_text(text)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    specification = importlib.util.spec_from_file_location("_made_task", folder / "task.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    module.torch.manual_seed(0)
    save_file(module.Net().state_dict(), folder / "dense.safetensors")
    return folder


def _together(project: Path, name: str, *options: str, **environment: str) -> tuple[int, str]:
    """Two processes on the recipe; torchrun's exit code and everything that was printed."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "--",
        "fusepress", "compress", str(project / "recipe.yaml"), "--run", str(project / name), *options,
    ]  # fmt: skip
    done = subprocess.run(
        command,
        cwd=project,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def _statuses(record: RunRecord) -> dict[str, str]:
    return {stage.name: stage.status for stage in record.stages}


def _figures(record: RunRecord) -> dict[str, list[tuple[Any, ...]]]:
    """Everything but what is timed."""
    return {
        stage.name: [(m.name, m.value, m.low, m.high) for m in stage.measurements if not m.name.startswith("latency")]
        for stage in record.stages
    }


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _project(tmp_path_factory.mktemp("ddp") / "mine")


@pytest.fixture(scope="module")
def undisturbed(project: Path) -> RunRecord:
    """The run of two processes."""
    code, told = _together(project, "two/r")
    assert (project / "two/r/run.json").exists(), told
    record = read_run(project / "two/r")
    assert record.verdict is not None, told
    assert code == (0 if record.verdict == "PASS" else 1), told  # torchrun's own code for any that is not 0
    return record


@pytest.mark.long
def test_two_processes_end_as_one(project: Path, undisturbed: RunRecord) -> None:
    run(["compress", str(project / "recipe.yaml"), "--run", str(project / "one/r"), "--json"])
    one = read_run(project / "one/r")
    assert undisturbed.verdict == one.verdict
    assert _statuses(undisturbed) == _statuses(one)
    figures, expected = _figures(undisturbed), _figures(one)
    for stage in ("baseline", "score", "prune"):
        assert figures[stage] == expected[stage]
        assert undisturbed.stage(stage).key == one.stage(stage).key  # type: ignore[union-attr]
    for name in (
        "baseline/dense.safetensors",
        "baseline/dense.onnx",
        "baseline/groups.json",
        "score/scores.safetensors",
        "prune/plan.json",
        "prune/pruned.safetensors",
    ):
        assert (project / "two/r" / name).read_bytes() == (project / "one/r" / name).read_bytes(), name
    assert not list((project / "two").glob(".shared-*"))
    assert not list((project / "two/.store").glob("aside-*"))


@pytest.mark.long
def test_a_second_run_of_two_processes_does_nothing(project: Path, undisturbed: RunRecord) -> None:
    _, told = _together(project, "two/again")
    assert "nothing to do" in told
    assert told.count("\nverdict ") == 1  # one process speaks
    again = read_run(project / "two/again")
    assert set(_statuses(again).values()) == {"cached", "skipped"}
    assert [stage.key for stage in again.stages] == [stage.key for stage in undisturbed.stages]


@pytest.mark.long
@pytest.mark.parametrize(
    ("where", "stage"), [("sample_stats:1", "baseline"), ("losses:2", "score"), ("losses:12", "finetune")]
)
def test_a_rank_killed_in_the_middle_loses_nothing_that_was_committed(
    project: Path, undisturbed: RunRecord, where: str, stage: str
) -> None:
    name = f"killed-{stage}/r"
    code, told = _together(project, name, DIE_AT=where)
    assert code != 0
    broken = read_run(project / name)
    found = broken.stage(stage)
    assert found is not None
    assert found.status == "failed", told
    assert "rank 1" in str(found.why), told
    assert "run the same command again" in str(found.why)
    assert "no sign of life from rank 1" in told
    finished = {one.name for one in broken.stages if one.status == "done"}
    assert not (project / name / stage).exists()
    _together(project, name)
    record = read_run(project / name)
    assert {one.name for one in record.stages if one.status == "cached"} >= finished
    assert record.artifacts["onnx"].sha256 == undisturbed.artifacts["onnx"].sha256
    assert _figures(record) == _figures(undisturbed)


@pytest.mark.long
def test_a_rank_that_raises_is_named_with_its_error(project: Path) -> None:
    code, told = _together(project, "raised/r", RAISE_AT="losses:2")
    assert code != 0
    assert "error at rank 1: ZeroDivisionError: in the user's code at stage score" in told
    stage = read_run(project / "raised/r").stage("score")
    assert stage is not None
    assert stage.status == "failed"
    assert "error at rank 1: ZeroDivisionError" in str(stage.why)
    assert "_perhaps_die" in (project / "raised/r/log.txt").read_text()  # its traceback


@pytest.mark.long
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            [["--run", "a/r"], ["--run", "b/r"]],
            r"expected a run folder that all 2 processes share; got one that",
        ),
        ([["--run", "c/r"], ["--run", "c/r", "-o", "seed=1"]], r"expected every process to have the same recipe; got"),
        ([["--run", "d/r", "-o", "task=same.py:MyTask"]] * 2, r"expected batches\('train', 0, rank=0, world=2\) to"),
    ],
    ids=["folders", "recipes", "shards"],
)
def test_what_processes_must_share_is_checked_before_anything_is_spent(
    project: Path, options: list[list[str]], message: str
) -> None:
    text = (project / "task.py").read_text()
    (project / "same.py").write_text(text.replace("range(start * world + rank, last, world)", "range(start, last)"))
    common = ["-m", "fusepress", "compress", str(project / "recipe.yaml")]
    folders = [[str(project / word) if word.endswith("/r") else word for word in given] for given in options]
    processes = start_ranks([[*common, *given] for given in folders])
    told = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], told
    assert re.search(message, told[0]), told[0]
    assert "error: expected" not in told[1]  # one process speaks
    assert not any((project / name / "r").exists() for name in "abcd")


def test_ranks_that_read_other_data_are_refused_by_name(project: Path) -> None:
    command = ["-m", "fusepress", "compress", str(project / "recipe.yaml"), "--run", str(project / "apart/r")]
    processes = start_ranks([command] * 2, DATA_OF_1="of another version")
    told = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], told
    sha = "'[0-9a-f]{64}'"
    match = re.search(
        rf"expected every process to read the same data; got the fingerprints ({sha}) on rank 0 and ({sha}) on rank 1 "
        r"of the split train at task\.py:MyTask; give all machines the same data folder",
        " ".join(told[0].split()),
    )
    assert match, told[0]
    assert match[1] != match[2]
    assert not (project / "apart/r").exists()


def test_other_verbs_are_refused_in_several_processes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(["report", "somewhere"]) == 2
    assert "expected compress, the verb that several processes can share; got report in 2" in capsys.readouterr().err


def test_one_of_several_processes_speaks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert run(["report", "somewhere"]) == 2
    assert json.dumps(capsys.readouterr().err) == '""'
