"""The build kit: the right trtexec line for each TensorRT version, scripts that run, and no engine claimed."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fusepress.export.bundle import BuildKit, write_build_kit
from fusepress.export.onnx import export_onnx
from fusepress.export.runtime import OnnxSession
from fusepress.pipeline.errors import ExportError
from fusepress.pipeline.store import sha256_file
from fusepress.targets.profile import load_profile
from fusepress.targets.trtexec_command import trtexec_bench, trtexec_build
from tests.export_toys import inputs, two_branch
from tests.onnx_graphs import Graph

ORIN = load_profile("jetson-agx-orin-64gb")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kit") / "model.onnx"
    export_onnx(two_branch(), inputs(1), ["seg", "cls"], path, opset=17)
    return path


def _kit(folder: Path, model: Path, **options: Any) -> BuildKit:
    session = OnnxSession(model, 1)
    references = [(x, session(x)) for x in (inputs(1, 1), inputs(1, 2))]
    options = {"power_mode": None, "precision": "fp16", "references": references, **options}
    return write_build_kit(folder, model, ORIN, **options)


def test_the_kit_lists_every_file_with_its_hash_and_claims_no_engine(model: Path, tmp_path: Path) -> None:
    kit = _kit(tmp_path / "kit", model, sparse=True)
    manifest = json.loads((tmp_path / "kit" / "kit.json").read_text())
    assert manifest == kit.to_dict()
    assert manifest["built"] is False
    found = {p.relative_to(kit.path).as_posix() for p in kit.path.rglob("*") if p.is_file()}
    assert found == {*kit.files, "kit.json"}
    assert all(sha256_file(kit.path / name) == sha for name, sha in kit.files.items())
    readme = (kit.path / "README.md").read_text()
    assert "No engine was built" in readme
    assert "TensorRT 10.3, power mode MAXN" in readme
    assert [p.name for p in tmp_path.iterdir()] == ["kit"]


def test_the_same_arguments_give_the_same_bytes_also_over_an_old_kit(model: Path, tmp_path: Path) -> None:
    first = _kit(tmp_path / "a", model)
    _kit(tmp_path / "b", model, sparse=True)
    assert _kit(tmp_path / "b", model).files == first.files


@pytest.mark.parametrize(
    ("version", "precision", "has", "lacks"),
    [
        ("8.5.2", "int8", ["--fp16", "--int8"], ["--stronglyTyped", "--skipInference"]),
        ("8.6.12", "fp32", [], ["--fp16", "--int8", "--stronglyTyped"]),
        ("10.3", "int8", ["--stronglyTyped", "--skipInference"], ["--fp16", "--int8"]),
        ("11.4.1", "fp16", ["--skipInference"], ["--fp16", "--int8", "--stronglyTyped"]),
    ],
)
def test_build_flags_by_version(version: str, precision: str, has: list[str], lacks: list[str]) -> None:
    arguments = trtexec_build("m.onnx", "m.plan", version, precision, sparse=True)
    assert "--sparsity=enable" in arguments
    assert set(has) <= set(arguments)
    assert not set(lacks) & set(arguments)


def test_bench_flags_mean_the_same_on_each_version() -> None:
    flags = {"--useCudaGraph", "--noDataTransfers", "--useSpinWait", "--separateProfileRun"}
    assert flags <= set(trtexec_bench("m.plan", "10.3"))
    assert not flags & set(trtexec_bench("m.plan", "11.1"))


def test_tensorrt_8_gets_its_note_and_32_bit_indices(model: Path, tmp_path: Path) -> None:
    kit = _kit(tmp_path / "kit", model, tensorrt="8.5.2")
    assert any("the builder then chooses. Not tried." in note for note in kit.notes)
    listed = json.loads((kit.path / "references.json").read_text())
    index = next(entry for entry in listed[0]["inputs"] if entry["name"] == "index")
    assert index["type"] == "int32"
    stored = np.fromfile(kit.path / index["file"], np.int32).reshape(index["shape"])
    assert np.array_equal(stored, inputs(1, 1)["index"].numpy())


def test_what_cannot_become_a_kit_is_refused(model: Path, tmp_path: Path) -> None:
    modern = tmp_path / "modern.onnx"
    export_onnx(two_branch(), inputs(1), ["seg", "cls"], modern, opset=20)
    with pytest.raises(ExportError, match=r"at most operator set 17, which TensorRT 8\.6\.2 reads; got 20"):
        write_build_kit(tmp_path / "kit", modern, ORIN, power_mode=None, precision="fp16", tensorrt="8.6.2")
    with pytest.raises(ExportError, match=r"expected a reference of shape \(1, 3, 24, 24\) for 'image'; got \(2,"):
        _kit(tmp_path / "kit", model, references=[(inputs(2), {})])
    with pytest.raises(ExportError, match=r"expected reference inputs .*, without \['points', 'index'\]"):
        _kit(tmp_path / "kit", model, references=[({"image": inputs(1)["image"]}, {})])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(ExportError, match="expected an empty folder for the build kit; got other files"):
        _kit(tmp_path / "mine", model)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "modern.onnx"]


# --- the scripts, with a program in trtexec's place that writes down how it is called ----

FAKE = """#!/usr/bin/env bash
echo "&&&& RUNNING TensorRT.trtexec [TensorRT v{version}] # $*"
[ "$1" = --help ] && exit 0
echo "$*" >> "{folder}/calls"
for argument in "$@"; do
  case "$argument" in
    --exportOutput=*) cp "{folder}/${{argument#--exportOutput=}}" "${{argument#--exportOutput=}}" ;;
    --saveEngine=*) echo plan > "${{argument#--saveEngine=}}" ;;
  esac
done
echo "[I] GPU Compute Time: min = 1 ms"
"""


def _device(tmp_path: Path, version: str, factor: float) -> dict[str, str]:
    """A device whose model returns `factor` times the references."""
    folder = tmp_path / "device"
    folder.mkdir()
    program = folder / "trtexec"
    program.write_text(FAKE.format(version=version, folder=folder))
    program.chmod(0o755)
    kit = tmp_path / "kit"
    for number, entry in enumerate(json.loads((kit / "references.json").read_text())):
        outputs = [
            {
                "name": o["name"],
                "dimensions": "x",
                "values": (np.fromfile(kit / o["file"], o["type"]) * factor).tolist(),
            }
            for o in entry["outputs"]
        ]
        (folder / f"output_{number}.json").write_text(json.dumps(outputs))
    return {**os.environ, "TRTEXEC": str(program)}


def _run(script: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([script], env=environment, capture_output=True, text=True, check=False)


def test_the_scripts_run_from_anywhere_and_check_the_outputs(model: Path, tmp_path: Path) -> None:
    kit = _kit(tmp_path / "kit", model, sparse=True)
    device = _device(tmp_path, "100300", 1.001)
    built, timed = _run(kit.path / "build.sh", device), _run(kit.path / "bench.sh", device)
    assert (built.returncode, timed.returncode) == (0, 0), built.stderr + timed.stdout + timed.stderr
    calls = (tmp_path / "device" / "calls").read_text().splitlines()
    assert [call.split()[0] for call in calls[:4]] == ["--onnx=model.onnx"] * 2 + [
        "--loadEngine=model.plan",
        "--loadEngine=model_without_sparse_kernels.plan",
    ]
    assert "--stronglyTyped" in calls[0]
    assert "--sparsity=enable" in calls[0]
    assert "--sparsity=disable" in calls[1]
    assert "image:references/0_input_0.bin,points:references/0_input_1.bin" in calls[5]
    assert "--exportProfile=model.profile.json" in calls[4]
    assert "reference 1 cls: largest difference 0.001" in timed.stdout
    assert (kit.path / "device.txt").exists()


def test_outputs_that_differ_and_other_versions_stop_the_scripts(model: Path, tmp_path: Path) -> None:
    kit = _kit(tmp_path / "kit", model)
    device = _device(tmp_path, "8502", 1.5)
    refused = _run(kit.path / "build.sh", device)
    assert refused.returncode == 2
    assert "expected TensorRT 10; got 8502" in refused.stderr
    forced = {**device, "ANY_VERSION": "1"}
    assert _run(kit.path / "build.sh", forced).returncode == 0
    timed = _run(kit.path / "bench.sh", forced)
    assert timed.returncode == 1
    assert "expected at most 0.02; got 0.5" in timed.stderr


@pytest.mark.parametrize(
    ("mode", "said", "told"),
    [
        (
            "MAXN",
            "NV Power Mode: MAXN_SUPER\n2",
            "expected power mode MAXN; got MAXN_SUPER; set it with nvpmodel",
        ),
        ("MAXN", "NV Fan Mode:quiet\nNV Power Mode: MAXN\n0", ""),
        ("30W", "NV Power Mode: MODE_30W\n2", ""),
        ("30W", "NV Power Mode: MODE_30W_ALL\n3", "expected power mode 30W; got 30W_ALL"),
        ("15W", "NVPM ERROR: 15W is not a mode", "expected power mode 15W; got none"),
    ],
)
def test_another_power_mode_is_told_whatever_its_name_begins_with(
    model: Path, tmp_path: Path, mode: str, said: str, told: str
) -> None:
    write_build_kit(tmp_path / "kit", model, ORIN, power_mode=mode, precision="fp16")
    device = _device(tmp_path, "100300", 1.0)
    tool = tmp_path / "device" / "nvpmodel"
    tool.write_text(f"#!/bin/sh\nprintf '%s\\n' {shlex.quote(said)}\n")
    tool.chmod(0o755)
    assert _run(tmp_path / "kit" / "build.sh", device).returncode == 0
    timed = _run(tmp_path / "kit" / "bench.sh", {**device, "PATH": f"{tool.parent}:{device['PATH']}"})
    assert timed.returncode == 0, timed.stderr
    assert told in timed.stderr
    assert ("expected power mode" in timed.stderr) == bool(told)


def test_names_and_modes_are_never_run_as_commands(tmp_path: Path) -> None:
    graph = Graph(17)
    x = graph.input("in:0 $(touch pwned)", [1, 4])
    y = graph.output(graph.add("Relu", x, name="relu"))
    reference = (torch.ones(1, 4), torch.ones(1, 4))
    write_build_kit(
        tmp_path / "kit",
        graph.save(tmp_path / "m.onnx"),
        ORIN,
        power_mode='a"; touch pwned; echo "',
        precision="fp16",
        references=[({x: reference[0]}, {y: reference[1]})],
    )
    device = _device(tmp_path, "100300", 1.0)
    assert _run(tmp_path / "kit" / "build.sh", device).returncode == 0
    assert _run(tmp_path / "kit" / "bench.sh", device).returncode == 0
    assert "--loadInputs=in:0 $(touch pwned):references/0_input_0.bin" in (tmp_path / "device" / "calls").read_text()
    assert not list(tmp_path.rglob("pwned"))
    with pytest.raises(ExportError, match=r"expected a TensorRT version such as 10\.3; got '10\.3; rm'"):
        write_build_kit(
            tmp_path / "other", tmp_path / "m.onnx", ORIN, power_mode=None, precision="fp16", tensorrt="10.3; rm"
        )


def test_half_precision_outputs_are_compared(tmp_path: Path) -> None:
    graph = Graph(17, half=True)
    x = graph.input("x", [1, 4])
    y = graph.output(graph.add("Relu", x, name="relu"))
    half = torch.ones(1, 4, dtype=torch.float16)
    write_build_kit(
        tmp_path / "kit",
        graph.save(tmp_path / "m.onnx"),
        ORIN,
        power_mode=None,
        precision="fp16",
        references=[({x: half}, {y: half})],
    )
    timed = _run(tmp_path / "kit" / "bench.sh", _device(tmp_path, "100300", 1.001))
    assert timed.returncode == 0, timed.stderr
    assert "reference 0 relu_out: largest difference" in timed.stdout
