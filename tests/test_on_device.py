"""`fusepress measure --host` and `targets doctor` over a real OpenSSH server, on a double of a device.

Figures join a run's record and are judged; exit codes say how.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from fusepress.export.branches import split_branches
from fusepress.export.bundle import write_build_kit
from fusepress.export.onnx import export_onnx
from fusepress.export.passes import made_up_batch
from fusepress.export.runtime import OnnxSession
from fusepress.export.runtime_cuda import CudaSession
from fusepress.pipeline import api, cli, measuring
from fusepress.pipeline.errors import ExportError, MeasureError, UsageError
from fusepress.pipeline.evidence import Artifact, Measurement, RunRecord, StageRecord, read_run
from fusepress.pipeline.measuring import Arrivals, HostSettings, budget_verdicts, parse_budgets
from fusepress.pipeline.on_device import DeviceSettings
from fusepress.pipeline.store import sha256_file, sha256_tree
from fusepress.targets import remote
from fusepress.targets.host import gpu_name
from fusepress.targets.profile import load_profile
from fusepress.targets.remote_result import RemoteSettings
from tests import trtexec_formats as formats
from tests.device_double import SSHD, DeviceDouble, Server
from tests.export_toys import inputs, two_branch
from tests.onnx_graphs import Graph

ORIN = load_profile("jetson-agx-orin-64gb")

needs_sshd = pytest.mark.skipif(SSHD is None, reason="needs OpenSSH's server: apt-get install openssh-server")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    graph = Graph()
    graph.input("x", (1, 3))
    graph.output(graph.add("Mul", "x", graph.constant("two", np.full(3, 2.0, np.float32)), name="double"), (1, 3))
    return graph.save(tmp_path / "model.onnx")


def row(name: str, low: float | None, high: float | None, note: str | None = None) -> Measurement:
    return Measurement(name=name, value=2.0, low=low, high=high, n=400, kind="measured", note=note)


@pytest.mark.parametrize(
    ("found", "verdict", "why"),
    [
        (row("latency.p99_ms", 1.9, 2.1), "PASS", "the whole 95 % interval is within the limit"),
        (row("latency.p99_ms", 3.1, None), "FAIL", "the whole 95 % interval is beyond the limit"),
        (row("latency.p99_ms", 1.9, None), "INCONCLUSIVE", "400 runs give no upper bound for p99_ms; measure longer"),
        (row("latency.p99_ms", 1.9, 3.1), "INCONCLUSIVE", "the 95 % interval 1.9 to 3.1 holds the limit"),
        (row("latency.p99_ms", 1.9, 2.1, "unstable: x"), "INCONCLUSIVE", "the figures cannot be trusted"),
        (row("latency.p99_ms", 1.9, 2.1, "GPU compute time is unstable, with 3 %"), "PASS", "within the limit"),
    ],
)
def test_a_budget_passes_only_with_a_whole_interval_that_can_be_trusted(
    found: Measurement, verdict: str, why: str
) -> None:
    (judged,) = budget_verdicts([found], parse_budgets(["p99_ms=3"]))
    assert judged.verdict == verdict
    assert why in judged.why


def test_budgets_of_parts_and_of_late_arrivals() -> None:
    assert parse_budgets(["camera.mean_ms=6", "miss_rate=0.001"]) == {"camera.mean_ms": 6.0, "miss_rate": 0.001}
    with pytest.raises(UsageError, match=r"expected a budget such as p99_ms=5 or camera.mean_ms=6.*; got 'camera=6'"):
        parse_budgets(["camera=6"])
    with pytest.raises(UsageError, match=r"expected a budget of what was measured: mean_ms; got 'lidar.mean_ms'"):
        budget_verdicts([row("latency.mean_ms", 1.0, 2.0)], {"lidar.mean_ms": 1.0})


def test_arrivals_on_this_host(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["measure", str(model), "--seconds", "0.3", "--arrivals", "100", "--deadline", "1000", "--json"]
    assert cli.run([*arguments, "--budget", "miss_rate=0.5"]) == 0
    rows = json.loads(capsys.readouterr().out)["measurements"]
    assert rows["miss_rate"]["value"] == 0.0
    assert rows["arrivals.mean_ms"]["n"] == 30
    assert {"mean_ms", "p50_ms", "p90_ms", "p99_ms", "p999_ms"} <= set(rows)
    with pytest.raises(UsageError, match=r"expected arrivals at a constant rate on this host .*; got a device too"):
        api.measure(model, arrivals=Arrivals(rate_hz=10.0), device=DeviceSettings(host="orin"))


@needs_sshd
def test_an_onnx_file_is_measured_on_the_device_and_judged(
    model: Path, server: Server, double: DeviceDouble, capsys: pytest.CaptureFixture[str]
) -> None:
    double.write("outputs.json", formats.outputs({"double_out": made_up_outputs(model)}))
    arguments = ["measure", str(model), "--host", "double", "--ssh-config", str(server.config), "--json"]
    arguments += ["--target", ORIN.name, "--precision", "fp32", "--seconds", "1"]
    assert cli.run([*arguments, "--budget", "p99_ms=5", "--budget", "p999_ms=5"]) == 4
    told = json.loads(capsys.readouterr().out)
    assert {v["gate"]: v["verdict"] for v in told["verdicts"]} == {
        "latency.p99_ms": "PASS",
        "latency.p999_ms": "INCONCLUSIVE",  # 1,200 runs bound no 99.9th percentile
    }
    mean = told["measurements"]["mean_ms"]
    assert (mean["device"], mean["power_mode"], mean["runtime"]) == (ORIN.name, "MAXN", "tensorrt 10.3.0")
    assert mean["artifact_sha256"] == sha256_file(model)
    assert told["measurements"]["parity.device.max_rel"]["value"] < 1e-6
    assert told["measurements"]["energy_mj"]["value"] > 0
    double.write("outputs.json", formats.outputs({"double_out": [9.0, 9.0, 9.0]}))
    settings = DeviceSettings(host="double", ssh_config=server.config, remote=RemoteSettings(seconds=1.0, rounds=1))
    with pytest.raises(
        MeasureError, match=r"expected outputs within 0.001 of their scale; got .* at output 'double_out'"
    ):
        api.measure(model, device=settings, target=ORIN.name, precision="fp32")


@needs_sshd
def test_a_run_gets_the_device_s_figures_and_is_judged_again(
    tmp_path: Path, model: Path, server: Server, double: DeviceDouble
) -> None:
    run = tmp_path / "run"
    session = OnnxSession(model)
    made_up = made_up_batch(session).inputs
    write_build_kit(
        run / "kit", model, ORIN, power_mode="MAXN", precision="fp32", references=[(made_up, session(made_up))]
    )
    double.write("outputs.json", formats.outputs({"double_out": (2 * made_up["x"][0]).tolist()}))
    (run / "model.onnx").write_bytes(model.read_bytes())
    recipe = {
        "task": "task.py:Task", "checkpoint": "x.safetensors", "target": ORIN.name,
        "gates": {"latency": {"p99_ms": 5.0}},
    }  # fmt: skip
    (run / "recipe.json").write_text(json.dumps(recipe))
    record = RunRecord(
        name="run", fusepress="0", target=ORIN.name, recipe_sha256="0", task_sha256="0", checkpoint_sha256="0", seed=0,
        target_profile={"family": "jetson", "power_mode": "MAXN", "precision": "fp32"},
        task={"name": "Task", "metrics": {"miou": "max"}, "branches": {}},
        stages=[StageRecord(name="verify", status="done")],
        artifacts={
            "onnx": Artifact(path="model.onnx", sha256=sha256_file(model)),
            "build_kit": Artifact(path="kit", sha256=sha256_tree(run / "kit")),
        },
    )  # fmt: skip
    (run / "run.json").write_text(record.to_json())
    settings = DeviceSettings(host="double", ssh_config=server.config, remote=RemoteSettings(seconds=1.0, rounds=1))
    measured = api.measure(run, device=settings)
    assert measured.record is not None
    assert measured.record.verdict == "PASS", measured.record.why
    verify = read_run(run).stage("verify")
    assert verify is not None
    assert [m.name for m in verify.measurements].count("latency.p99_ms") == 1
    assert json.loads((run / "device" / "measured.json").read_text())["clocks_locked"] is True
    assert "Layers" in json.loads((run / "device" / "model.layers.json").read_text())
    again = api.measure(run, device=settings, budgets=["mean_ms=1"])
    assert [v.verdict for v in again.verdicts] == ["FAIL"]
    verify = read_run(run).stage("verify")
    assert verify is not None
    assert [m.name for m in verify.measurements].count("latency.p99_ms") == 1  # in place of the former


@needs_sshd
def test_branches_of_a_run_are_built_and_timed_on_the_device(
    tmp_path: Path, server: Server, double: DeviceDouble
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    export_onnx(two_branch(), inputs(1), ["seg", "cls"], run / "model.onnx", opset=17)
    limits = {"camera": 6.0, "lidar": 4.0, "e2e": 12.0}
    recipe = {
        "task": "task.py:Task", "checkpoint": "x.safetensors", "target": ORIN.name,
        "gates": {"latency": {"parts": limits, "schedule": "parallel"}},
    }  # fmt: skip
    (run / "recipe.json").write_text(json.dumps(recipe))
    branches = {"camera": ["camera"], "lidar": ["pillar", "pillar2", "lidar"]}
    record = RunRecord(
        name="run", fusepress="0", target=ORIN.name, recipe_sha256="0", task_sha256="0", checkpoint_sha256="0", seed=0,
        target_profile={"family": "jetson", "power_mode": "MAXN", "precision": "fp32"},
        task={
            "name": "Task", "metrics": {"miou": "max"}, "branches": branches,
            "outside": {"lidar.voxelise": {ORIN.name: 1.5}, "decode": {ORIN.name: 0.5}},
        },
        stages=[StageRecord(name="verify", status="done")],
        artifacts={"onnx": Artifact(path="model.onnx", sha256=sha256_file(run / "model.onnx"))},
    )  # fmt: skip
    (run / "run.json").write_text(record.to_json())
    (tmp_path / "cut").mkdir()
    random = np.random.default_rng(0)
    for name, path in split_branches(run / "model.onnx", branches, tmp_path / "cut").items():
        mean_ms = {"camera": 5.0, "lidar": 3.0, "rest": 2.0}[name]
        double.times(sha256_file(path)[:16], random.normal(mean_ms, 0.01, 400))
    settings = DeviceSettings(host="double", ssh_config=server.config, remote=RemoteSettings(seconds=1.0, rounds=1))
    found = api.measure(run, device=settings, parts="parallel", budgets=["camera.mean_ms=6", "lidar.mean_ms=2"])
    assert [v.verdict for v in found.verdicts] == ["PASS", "FAIL"]
    rows = {m.name: m for m in found.measurements}
    means = {name: rows[f"latency.{name}.mean_ms"].value for name in ("camera", "lidar", "rest", "e2e")}
    # the camera's branch is longer than the LiDAR's with its voxels; then come the rest and the decoder
    assert means == pytest.approx({"camera": 5.0, "lidar": 3.0, "rest": 2.0, "e2e": 5.0 + 2.0 + 0.5}, abs=0.01)
    assert {rows[f"latency.{name}.mean_ms"].artifact_sha256 for name in means} == {record.artifacts["onnx"].sha256}
    pipeline = {part["name"]: part for part in found.environment["pipeline"]["parts"]}
    assert pipeline["camera"]["critical"]
    assert pipeline["camera"]["gain_ms"] == pytest.approx(0.5, abs=0.02)  # then the other one is as long
    assert pipeline["lidar"]["slack_ms"] == pytest.approx(0.5, abs=0.02)
    assert found.record is not None
    verify = found.record.stage("verify")
    assert verify is not None
    assert {v.gate: v.verdict for v in verify.verdicts} == {
        f"latency.{name}.mean_ms": "PASS" for name in ("camera", "lidar", "e2e")
    }


def test_this_machine_takes_a_device_s_place(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The runner without a connection, on the double: this machine has no GPU."""
    device = DeviceDouble(tmp_path / "here")
    device.root("proc/device-tree/model", "")  # no Jetson's name, so a machine that nvidia-smi describes
    smi = "NVIDIA RTX A4000, 8.6, 550.1, 1560, 2100, 63, 0x0000000000000000"
    device.program("nvidia-smi", f"#!/bin/sh\ncase $* in *name*) echo '{smi}' ;; *) exec sleep 60 ;; esac\n")
    for name in ("nvpmodel", "jetson_clocks"):
        (device.folder / "bin" / name).unlink()
    monkeypatch.setattr(remote, "LOCAL_LOCKS", tmp_path / "locks")
    monkeypatch.setenv("HOME", str(device.home))
    monkeypatch.setenv("PATH", f"{device.folder / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("FUSEPRESS_DEVICE_ROOT", str(device.folder / "root"))
    device.write("outputs.json", formats.outputs({"double_out": made_up_outputs(model)}))
    arguments = ["measure", str(model), "--runtime", "tensorrt", "--precision", "fp32", "--seconds", "3", "--json"]
    try:
        assert cli.run([*arguments, "--streams", "4", "--budget", "mean_ms=3"]) == 0
        told = json.loads(capsys.readouterr().out)
        mean = told["measurements"]["mean_ms"]
        assert (mean["device"], mean["runtime"]) == ("NVIDIA RTX A4000", "tensorrt 10.3.0")
        assert mean["value"] == pytest.approx(2.0, abs=0.01)
        assert told["measurements"]["throughput_hz"]["value"] == pytest.approx(500, rel=0.1)
        assert told["measurements"]["streams.mean_ms"]["note"] == "of one of 4 streams"
        assert device.calls("--infStreams=4") == 1
        device.program("trtexec", "#!/bin/sh\necho broken\n")
        assert cli.run(arguments) == 5
        assert (
            "expected this machine to be fit for a measurement; got 1 reason(s) against it; mend"
            in capsys.readouterr().err
        )
    finally:
        device.end_jobs()


def made_up_outputs(model: Path) -> list[float]:
    session = OnnxSession(model)
    return [float(value) for value in session(made_up_batch(session).inputs)["double_out"].flatten()]


def test_what_does_not_go_together_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"expected --host or --runtime; got --host orin and --runtime cuda"):
        cli.cli(["measure", str(model), "--host", "orin", "--runtime", "cuda"], standalone_mode=False)
    with pytest.raises(UsageError, match=r"expected at least one stream; got 0; raise --streams"):
        HostSettings(streams=0)
    with pytest.raises(UsageError, match=r"expected parts on a CPU or with TensorRT; got ONNX Runtime's CUDA provider"):
        api.measure(tmp_path, parts="serial", host=HostSettings(runtime="cuda"))


@pytest.mark.skipif(gpu_name() is not None, reason="this machine has a GPU")
def test_a_machine_without_a_gpu_refuses_the_cuda_provider(model: Path) -> None:
    with pytest.raises(
        ExportError, match=r"expected ONNX Runtime's CUDAExecutionProvider; got CPUExecutionProvider al"
    ):
        api.measure(model, host=HostSettings(runtime="cuda"))


def test_the_cuda_provider_s_code_with_its_memory_on_the_cpu(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bindings and figures are ONNX Runtime's own; the provider is the CPU's, for want of a GPU."""
    monkeypatch.setattr(CudaSession, "PROVIDER", "CPUExecutionProvider")
    monkeypatch.setattr(CudaSession, "MEMORY", "cpu")
    monkeypatch.setattr(measuring, "gpu_name", lambda: "a double")
    assert cli.run(["measure", str(model), "--runtime", "cuda", "--seconds", "0.3", "--streams", "2", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["measurements"]
    assert (rows["mean_ms"]["device"], rows["mean_ms"]["runtime"]) == ("a double", "onnxruntime-cuda")
    throughput = rows["throughput_hz"]
    assert 0 < throughput["low"] <= throughput["value"] <= throughput["high"]
    assert rows["streams.mean_ms"]["n"] == throughput["n"]


def test_throughput_of_two_sessions_on_this_host(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["measure", str(model), "--seconds", "0.3", "--streams", "2", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["measurements"]
    assert rows["throughput_hz"]["device"] == "host-cpu"
    assert "2 sessions at once" in rows["throughput_hz"]["note"]


@needs_sshd
def test_the_doctor_says_what_is_amiss_and_ends_with_3(
    server: Server, double: DeviceDouble, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["targets", "doctor", "double", "--ssh-config", str(server.config), "--target", ORIN.name]
    assert cli.run(arguments) == 0
    said = capsys.readouterr().out
    assert "NVIDIA Jetson AGX Orin Developer Kit" in said
    assert "power mode MAXN; GPU 306 MHz" in said
    assert "a latency can be measured here" in said
    double.write("mode", "2\n")
    assert cli.run([*arguments, "--json"]) == 3
    found = json.loads(capsys.readouterr().out)
    assert found["device"]["tensorrt"] == "10.3.0"
    assert [f["what"] for f in found["findings"] if f["level"] == "refuse"] == ["power mode"]
    assert str(double.home) not in json.dumps(found)
