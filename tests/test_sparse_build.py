"""2:4 in three numbers, and the trial that decides which engine is kept."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusepress.export import engine_run
from fusepress.export.engine import BuildOptions, build_rtx_engine, build_tensorrt_engine
from fusepress.export.engine_run import EngineSession
from fusepress.export.engine_spread import time_builds
from fusepress.export.inspector import EngineLayer
from fusepress.export.sparse_build import (
    METRIC_TOLERANCE,
    count_sparse,
    judge_bytes,
    judge_sparse,
    unproven,
)
from fusepress.export.sparsity import check_sparsity_2to4
from fusepress.pipeline.console import Reporter
from fusepress.pipeline.errors import BuildError
from fusepress.pipeline.stages import build as build_stage
from fusepress.pipeline.store import sha256_file
from fusepress.pipeline.task import Batch, LoadedTask, TaskSource
from fusepress.targets import measure
from fusepress.targets.measure import Speedup, measure_interleaved
from fusepress.targets.profile import load_profile
from tests.doubles import play_tensorrt
from tests.onnx_graphs import Graph
from tests.test_export_sparsity import report_of

ELIGIBLE = "[I] (Sparsity) Layers eligible for sparse math: Conv_6 + Relu_7, Conv_8, Conv_9\n"
PICKED = "[I] (Sparsity) TRT inference plan picked sparse implementation for layers: Conv_8, Conv_9\n"
REPORT = report_of(("a/Conv", "valid"), ("b/Conv", "valid"), ("c/Conv", "dense"))


def _layer(tactic: str, sparse: bool | None) -> EngineLayer:
    return EngineLayer(name="c", type="CaskConvolution", precision="fp16", tactic=tactic, has_sparse_weights=sparse)


@pytest.mark.parametrize(
    ("log", "layers", "eligible", "picked"),
    [
        (ELIGIBLE + PICKED, [], 3, 2),
        (ELIGIBLE + "(Sparsity) TRT inference plan picked sparse implementation for layers: \n", [], 3, 0),
        (ELIGIBLE, [], 3, None),
        (ELIGIBLE, [_layer("sm80_xmma_fprop_sparse_conv", True), _layer("sm80_xmma_fprop", True)], 3, 1),
        (ELIGIBLE, [_layer("sm80_xmma_fprop", True)], 3, 0),
        (ELIGIBLE, [_layer("sm80_xmma_fprop_sparse_conv", True), _layer("", True)], 3, None),
        ("nothing of it", [_layer("stub", None)], None, None),
        (None, [], None, None),
    ],
    ids=["both", "none-picked", "log-half", "tactics", "tactics-dense", "hidden", "rtx", "no-build"],
)
def test_what_the_log_does_not_say_is_unknown(
    log: str | None, layers: list[EngineLayer], eligible: int | None, picked: int | None
) -> None:
    counts = count_sparse(REPORT, log, layers)
    assert (counts.valid, counts.eligible, counts.picked) == (2, eligible, picked)
    shown = counts.to_dict()
    assert shown["picked by a tactic"] == ("unknown" if picked is None else picked)
    assert bool(shown["because"]) == (
        picked is None or "tactics" in str(counts.notes) or "kernels" in str(counts.notes)
    )


def test_a_log_and_kernels_that_disagree_are_told() -> None:
    counts = count_sparse(REPORT, ELIGIBLE + PICKED, [_layer("sm80_xmma_fprop_sparse_conv", True)])
    assert counts.picked == 2
    assert counts.notes == ("the log says 2 picked, the names of the kernels 1",)


@given(
    low=st.floats(0.5, 2),
    spread=st.floats(0, 0.5),
    plain=st.floats(0, 1),
    change=st.floats(-0.1, 0.1),
    direction=st.sampled_from(["max", "min"]),
)
def test_an_engine_is_kept_only_when_faster_beyond_noise_at_equal_accuracy(
    low: float, spread: float, plain: float, change: float, direction: str
) -> None:
    speedup = Speedup(value=low + spread / 2, low=low, high=low + spread)
    verdict = judge_sparse(speedup, plain_metric=plain, sparse_metric=plain + change, direction=direction)
    worse = -change if direction == "max" else change
    kept = (
        low > 1 and (plain - (plain + change) if direction == "max" else (plain + change) - plain) <= METRIC_TOLERANCE
    )
    assert (verdict.decision == "kept") == kept
    if worse > 2 * METRIC_TOLERANCE:
        assert "the metric is" in verdict.why


def test_a_machine_that_cannot_measure_proves_nothing() -> None:
    assert unproven("no GPU").to_dict() == {"2:4": "unproven: no GPU"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two 2:4 convolutions."""
    graph = Graph(18)
    x = graph.input("x", [1, 16, 8, 8])
    for name in ("a", "b"):
        x = graph.add("Relu", graph.conv(x, (16, 16), name), name=f"{name}/Relu")
        weight = np.frombuffer(graph.constants[-1].raw_data, np.float32).reshape(16, 16, 3, 3).copy()
        weight[:, 0::4] = weight[:, 2::4] = 0
        graph.constants[-1].raw_data = weight.tobytes()
    graph.output(x)
    return graph.save(tmp_path_factory.mktemp("sparse") / "m.onnx")


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX is not installed")
def test_tensorrt_rtx_builds_the_same_bytes_both_ways_and_proves_nothing(model: Path, tmp_path: Path) -> None:
    plain, sparse = (
        build_rtx_engine(model, tmp_path / str(flag), compute_capabilities=["8.9"], options=BuildOptions(sparse=flag))
        for flag in (False, True)
    )
    verdict = judge_bytes(plain, sparse)
    assert verdict is not None
    assert verdict.decision == "unproven"
    assert "tensorrt_rtx builds the same bytes with and without sparse kernels allowed" in verdict.why
    counts = count_sparse(check_sparsity_2to4(model), sparse.log_path.read_text(), sparse.layers)
    assert (counts.valid, counts.eligible, counts.picked) == (2, None, None)


# --- the trial on a machine that measures: on a test double, nothing is built or run ----------------------------------


class _Task:
    """One number a sample: what the model wrote first."""

    def batches(self, split: str, seed: int, *, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        if start == 0:
            yield Batch(inputs={"x": torch.ones(2, 16, 8, 8)}, sample_ids=["a", "b"], groups=["g", "g"])

    def sample_stats(self, outputs: dict[str, torch.Tensor], batch: Batch) -> dict[str, Any]:
        return {"first": outputs["b/Relu_out"].flatten(1)[:, 0].numpy()}

    def score(self, stats: dict[str, Any]) -> dict[str, float]:
        return {"mean": float(stats["first"].mean())}


@pytest.fixture
def double(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tensorrt is our test double and lives on the CPU; the GPU is an Orin that is a file."""
    play_tensorrt(10, tmp_path, monkeypatch)
    monkeypatch.setattr(engine_run, "EngineSession", partial(EngineSession, device="cpu"))
    monkeypatch.setattr(build_stage, "TRIAL_SECONDS", 0.2)
    clock = partial(measure.measure_interleaved, clock=lambda: sys.modules["tensorrt"].CLOCK_NS[0])
    monkeypatch.setattr(measure, "measure_interleaved", clock)


def _context(model: Path, target: str = "jetson-agx-orin-64gb") -> Any:
    task = LoadedTask(
        user=_Task(),
        source=TaskSource(spec="toys.py:Toy", files=()),
        branches={},
        metrics={"mean": "max"},
        keep=[],
    )
    return SimpleNamespace(
        artifacts={"onnx": model, "masks": model},
        recipe=SimpleNamespace(wants_2to4=True),
        profile=load_profile(target),
        power_mode=load_profile(target).default_mode,
        precision="fp32",
        final_precision="fp32",
        on_host=False,
        reporter=Reporter(quiet=True),
        task=task,
    )


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(("slow", "decision"), [("plain", "kept"), ("sparse", "not kept")])
def test_the_faster_engine_is_kept(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: str, decision: str
) -> None:
    monkeypatch.setenv("TENSORRT_DOUBLE_SLOW", slow)
    out, work = tmp_path / "out", tmp_path / "work"
    context = _context(model)
    assert build_stage._builds_here(context)
    out.mkdir()
    made = build_stage.Build._on_the_device(context, out, work)
    details = made.details
    shown = details["sparsity"]
    assert shown["2:4"].startswith(f"{decision}: ")
    assert (shown["valid in the ONNX"], shown["eligible in the build log"], shown["picked by a tactic"]) == (2, 2, 1)
    value, low, high = shown["speed-up of sparse kernels"]
    assert value == pytest.approx(4 if decision == "kept" else 1 / 4)
    assert low == high == pytest.approx(value)
    assert details["executed"]
    plan = json.loads((out / "model.engine").read_bytes())
    assert (2 in plan["flags"]) == (decision == "kept")
    assert details["engine"]["sha256"] == sha256_file(out / "model.engine")
    assert sorted(path.name for path in out.iterdir()) == ["model.engine", "model.layers.json", "model.log"]
    # several builds, and the latency of the one that is kept: of the GPU that ran it, whatever the target is called
    assert (details["builds"]["builds"], details["builds"]["different engines"]) == (3, 1)
    assert details["builds"]["mean_ms of each"] == [1.0] * 3
    mean = next(m for m in made.measurements if m.name == "latency.mean_ms")
    assert (mean.value, mean.kind, mean.device, mean.power_mode) == (1.0, "measured", "Orin", None)
    assert mean.artifact_sha256 == details["engine"]["sha256"]
    assert mean.runtime == "tensorrt 10.3.0"
    assert mean.note is not None
    assert mean.note.startswith("timed on the GPU that built it, by code that was not executed by us")
    assert mean.n is not None
    assert mean.n > 4
    assert details["engine"]["executed"] is True


@pytest.mark.usefixtures("double")
def test_an_engine_that_does_not_run_here_is_said_to_have_no_latency(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> EngineSession:
        raise BuildError(f"expected an engine that this GPU can load; got another at {path}; build it here")

    monkeypatch.setattr(engine_run, "EngineSession", refuse)
    context = _context(model)
    context.recipe.wants_2to4 = False
    (tmp_path / "out").mkdir()
    made = build_stage.Build._on_the_device(context, tmp_path / "out", tmp_path / "work")
    assert made.measurements == []
    assert made.details["executed"] is False
    assert made.details["engine"]["executed"] is False
    assert made.details["not timed"].startswith("expected an engine that this GPU can load")
    assert (tmp_path / "out/model.engine").is_file()


def test_of_several_builds_the_fastest_is_kept_and_equal_bytes_are_timed_once(tmp_path: Path) -> None:
    timed: list[str] = []

    def engine(name: str, sha256: str) -> Any:
        return SimpleNamespace(path=tmp_path / name, sha256=sha256)

    ticks = {"s1": 3_000_000, "s2": 1_500_000}
    now = [0]

    def callable_of(built: Any) -> Any:
        timed.append(built.path.name)

        def run() -> None:
            now[0] += ticks[built.sha256]

        return run

    spread = time_builds(
        [engine("a", "s1"), engine("b", "s2"), engine("c", "s1")],
        callable_of,
        lambda runs: measure_interleaved(runs, max_seconds=0.2, clock=lambda: now[0]),
    )
    assert timed == ["a", "b"]
    assert spread.fastest.path.name == "b"
    assert spread.mean_ms == (3.0, 1.5, 3.0)
    assert spread.relative == pytest.approx(1.0)
    shown = spread.to_dict()
    assert (shown["builds"], shown["different engines"], shown["slowest over fastest"]) == (3, 2, "+100.0 %")


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX is not installed")
def test_the_stage_says_unproven_where_engines_are_built_ahead_of_time(model: Path, tmp_path: Path) -> None:
    made = build_stage.Build().run(_context(model, "rtx-4090"), tmp_path / "out", tmp_path / "work")
    shown = made.details["sparsity"]
    assert (shown["valid in the ONNX"], shown["picked by a tactic"]) == (2, "unknown")
    assert shown["2:4"].startswith("unproven: tensorrt_rtx builds the same bytes")
    assert made.details["executed"] is False
    assert made.artifacts == {"engine": "model.engine"}
    assert made.details["engine"]["sha256"] == sha256_file(tmp_path / "out/model.engine")


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="TensorRT is installed")
def test_the_stage_says_unproven_where_only_a_kit_is_made(model: Path, tmp_path: Path) -> None:
    made = build_stage.Build().run(_context(model), tmp_path / "out", tmp_path / "work")
    assert made.artifacts == {"build_kit": "kit"}
    assert made.details["sparsity"]["2:4"] == (
        "unproven: no engine was built here; the kit builds and times it both ways on the device"
    )
    assert made.details["sparsity"]["eligible in the build log"] == "unknown"
    assert "--sparsity=enable" in (tmp_path / "out/kit/build.sh").read_text()


@pytest.mark.usefixtures("double")
def test_an_engine_runs_by_names_sample_by_sample(model: Path, tmp_path: Path) -> None:
    info = build_tensorrt_engine(model, tmp_path / "m.plan")
    session = EngineSession(info.path, device="cpu")
    x = torch.stack([torch.full((16, 8, 8), 1.0), torch.full((16, 8, 8), 2.0)])
    found = session({"x": x})["b/Relu_out"]
    assert found.shape == (2, 16, 8, 8)
    assert found.flatten(1)[:, 0].tolist() == [1024.0, 2048.0]
    with pytest.raises(
        BuildError, match=r"expected the engine's input 'x' of shape \(1, 16, 8, 8\); got \(1, 16, 8, 9\)"
    ):
        session({"x": torch.ones(1, 16, 8, 9)})
    with pytest.raises(BuildError, match="got None"):
        session({"z": x})
    (tmp_path / "other.plan").write_bytes(b"of another GPU")
    with pytest.raises(BuildError, match=r"expected an engine that this GPU and tensorrt 10\.3\.0 can load"):
        EngineSession(tmp_path / "other.plan", device="cpu")
