"""The record of a self-test: complete where TensorRT-RTX is, and says what is missing where TensorRT is not."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from fusepress.export.importer_probe import probe_importer
from fusepress.export.runtime import OnnxSession
from fusepress.export.sparsity import check_sparsity_2to4
from fusepress.export.tiny import KINDS, tiny_model
from fusepress.pipeline import self_test as module
from fusepress.pipeline.cli import run
from fusepress.pipeline.text import self_test_lines
from fusepress.targets.host import gpu_name
from fusepress.targets.operators import operator_faults
from fusepress.targets.profile import load_profile
from tests.doubles import play_tensorrt

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX is not installed (x86-64 only)"
)


@pytest.fixture
def one_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BUILDS", (("int8", True),))


@pytest.mark.parametrize("kind", KINDS)
def test_the_tiny_network_is_valid_2to4_and_read_everywhere(kind: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(tiny_model(kind), path)
    onnx.checker.check_model(onnx.load(path), full_check=True)
    report = check_sparsity_2to4(path)
    assert report.valid_layers == ["camera/sparse/Conv", "fuse/Conv"]
    for target in ("rtx-4090", "jetson-agx-orin-64gb", "drive-agx-orin"):
        assert operator_faults(onnx.load(path), load_profile(target)) == []


def test_int8_stays_near_fp32(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    feeds: dict[str, Any] = {
        "image": random.standard_normal((1, 3, 32, 32)).astype(np.float32),
        "points": random.standard_normal((1, 128, 64)).astype(np.float32),
        "index": random.permutation(1024)[None, :128],
    }
    found = []
    for kind in ("fp32", "int8"):
        onnx.save(tiny_model(kind), tmp_path / f"{kind}.onnx")
        found.append(OnnxSession(tmp_path / f"{kind}.onnx", 1).run_numpy(feeds)["up/ConvTranspose_out"])
    assert np.corrcoef(found[0].ravel(), found[1].ravel())[0, 1] > 0.99


@needs_rtx
@pytest.mark.usefixtures("one_build")
def test_a_machine_without_tensorrt_says_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    out = tmp_path / "record.json"
    assert run(["measure", "--self-test", "--seconds", "0.1", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    record = json.loads(out.read_text())
    rtx = record["tensorrt_rtx"]
    assert {"Det", "Unique"} <= set(rtx["importer"]["operators_refused"])
    (build,) = rtx["builds"].values()
    assert build["ok"]
    assert build["precisions"]["int8"] == 4
    assert build["sparse"]["picked by a tactic"] == "unknown"
    assert build["run"] == {"ok": True, "executed": False}
    assert record["onnxruntime"]["fp32"]["latency"]["mean_ms"] > 0
    assert any("engines were built and not run: torch sees no GPU" in why for why in record["missing"])
    if gpu_name() is None:
        assert not record["onnxruntime_cuda"]["fp32"]["ok"]
        assert any("expected ONNX Runtime's CUDAExecutionProvider; got CPU" in why for why in record["missing"])
    if importlib.util.find_spec("tensorrt") is None:
        assert "tensorrt: the Python package tensorrt is not installed" in record["missing"]
        assert "missing   tensorrt: the Python package tensorrt is not installed" in said
    assert str(tmp_path) not in out.read_text()
    assert f"wrote     {out}" in said


@pytest.mark.usefixtures("one_build")
def test_the_record_of_a_machine_with_tensorrt_holds_layers_and_sparse_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play_tensorrt(11, tmp_path, monkeypatch)  # a test double: nothing is built
    monkeypatch.setattr(module, "RUNTIMES", ("tensorrt",))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    record = module.self_test(seconds=0.1)
    (build,) = record["tensorrt"]["builds"].values()
    assert build["sparse"]["eligible in the build log"] == 4
    assert build["sparse"]["picked by a tactic"] == 1
    assert build["sparse_log"][0].startswith("[INFO] (Sparsity) Layers eligible")
    assert "I/O Tensors" in json.loads(build["inspector"])
    assert build["runtime_version"] == "11.4.1"


def test_a_library_that_is_not_there_or_breaks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert probe_importer("no_such_library") == {"missing": "the Python package no_such_library is not installed"}
    (tmp_path / "broken_library.py").write_text("raise RuntimeError('no driver')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    missing = probe_importer("broken_library")["missing"]
    assert "is installed and ended with exit status 1: RuntimeError: no driver" in missing


def test_whatever_is_raised_is_in_the_record_and_no_folder_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise AttributeError("no num_io_tensors in /opt/vendor/lib/trt.so, node camera/stem/Conv")

    monkeypatch.setattr(module, "_on_onnxruntime", broken)
    monkeypatch.setattr(module, "RUNTIMES", ())
    record = module.self_test(seconds=0.1)
    assert record["onnxruntime"]["fp32"]["ok"] is False
    error = record["onnxruntime"]["fp32"]["error"]
    assert error.startswith("AttributeError: no num_io_tensors in trt.so, node camera/stem/Conv (test_self_test.py:")


def test_an_engine_that_was_built_and_does_not_run_says_why() -> None:
    failed = {"ok": True, "precisions": {"int8": 4}, "run": {"ok": False, "error": "BuildError: another GPU\nmore"}}
    record = {
        "machine": {"system": "Linux", "host": {}},
        "onnxruntime": {},
        "tensorrt": {"importer": {}, "builds": {"int8": failed}},
        "tensorrt_rtx": {"importer": {}},
        "missing": [],
    }
    assert "build     int8: 4 layers in int8, built, not executed: BuildError: another GPU" in self_test_lines(record)


def test_measuring_nothing_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["measure"]) == 2
    assert "expected a run folder or an ONNX file; got neither; name one, or try --self-test" in capsys.readouterr().err


def test_a_worker_ends_with_its_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sleeper.py").write_text(
        "import os, time\nfrom pathlib import Path\nfrom fusepress.export.worker import read_job\n"
        f"read_job()\nPath({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\ntime.sleep(60)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    call = f"run_job('sleeper', {{}}, log=Path({str(tmp_path / 'log')!r}), timeout_s=60)"
    code = f"from pathlib import Path\nfrom fusepress.export.worker import run_job\n{call}"
    parent = subprocess.Popen([sys.executable, "-c", code])
    end = time.monotonic() + 50
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < end
        time.sleep(0.05)
    worker = int((tmp_path / "pid").read_text())
    parent.kill()
    parent.wait()
    while _lives(worker):
        assert time.monotonic() < end, "the worker outlived its parent"
        time.sleep(0.05)


def _lives(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
