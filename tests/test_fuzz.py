"""Files and texts that are almost right, or not at all: only a FusepressError may come out of what reads them.

The quick tests try a few dozen changes of each kind of file; `make test-long` tries thousands.
"""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save

from fusepress.pipeline.errors import FusepressError

FEW, MANY = 25, 1500
# the quick tests try the same examples every time: what a random one finds is for `make test-long` to say
QUIET = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

Reader = Callable[[Path], object]


# ----------------------------------------------------------------------------------------------------- what is changed


def _recipe() -> bytes:
    recipe = {
        "task": "task.py:T",
        "checkpoint": "c.safetensors",
        "target": "host-cpu",
        "score": {"method": "altermoma", "beta": 1.0},
        "prune": {"macs": 0.4, "align": 8},
        "finetune": {"steps": 10, "lr": 1e-3},
        "quantize": {"precision": "int8"},
        "gates": {
            "accuracy": {"max_drop": 0.03},
            "latency": {"mean_ms": 5.0, "parts": {"camera": 2.0}},
            "floors": {"miou@night": 0.3},
            "robustness": {"camera_blank": {"max_extra_drop": 0.03, "min": 0.3}},
            "release": {"file": "baseline.json", "max_drop": {"miou": 0.01}},
        },
    }
    return yaml.safe_dump(recipe).encode()


def _plan() -> bytes:
    from fusepress.pipeline.graph.plan import Member, PlannedGroup, PrunePlan

    members = (Member(param="a.weight", dim=0), Member(param="b.weight", dim=1))
    group = PlannedGroup(id="a.weight", branch="camera", width=8, kept=(0, 2, 5), members=members)
    return PrunePlan(groups=(group,), arch_sha256="0" * 64).to_json().encode()


def _profile() -> bytes:
    from fusepress.targets.profile import profile_path

    return profile_path("jetson-agx-orin-64gb").read_bytes()


def _log() -> bytes:
    return (
        b"&&&& RUNNING TensorRT.trtexec [TensorRT v100300] [b31] # trtexec --onnx=m.onnx\n"
        b"[11/20/2026-10:00:00] [W] * GPU compute time is unstable, with coefficient of variance = 3.1%.\n"
        b"[11/20/2026-10:00:01] [I] Throughput: 812.3 qps\n"
        b"[11/20/2026-10:00:01] [I] GPU Compute Time: min = 1.1 ms, max = 2 ms, mean = 1.2 ms, median = 1.2 ms, "
        b"percentile(99%) = 1.9 ms\n"
        b"[11/20/2026-10:00:02] [E] Error[4]: network has no output\n"
        b"&&&& PASSED TensorRT.trtexec [TensorRT v100300] [b31]\n"
    )


def _times() -> bytes:
    row = {"startComputeMs": 1.0, "computeMs": 2.0, "latencyMs": 3.0, "startH2dMs": 0.5}
    return json.dumps([{**row, "startComputeMs": float(i)} for i in range(3)]).encode()


def _layers() -> bytes:
    layer = {
        "Name": "conv1 + relu1",
        "LayerType": "CaskConvolution",
        "Inputs": [{"Name": "x", "Format/Datatype": "Half NC/2HW2"}],
        "Outputs": [{"Name": "y", "Format/Datatype": "Half"}],
        "TacticName": "sm80_xmma_fprop",
        "Metadata": "[ONNX Layer: camera/Conv]",
    }
    return json.dumps({"Layers": [layer, {**layer, "Name": "two"}], "Bindings": ["x", "y"]}).encode()


def _weights() -> bytes:
    return save({"a.weight": np.ones((4, 3), np.float32), "b.bias": np.zeros(4, np.float16)})


def _model() -> bytes:
    weight = numpy_helper.from_array(np.ones((4, 4, 1, 1), np.float32), "w")
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4, 2, 2]) for name in ("x", "y")]
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"], name="a/Conv"), helper.make_node("Relu", ["c"], ["y"])]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(model.SerializeToString())


def _run_json() -> bytes:
    from fusepress.pipeline.evidence import Artifact, Measurement, RunRecord, StageRecord, Verdict

    row = Measurement(name="accuracy.miou", value=0.66, low=0.6, high=0.7, kind="simulated")
    verdict = Verdict(gate="accuracy.miou", verdict="PASS", limit=0.03, value=0.01, low=0.0, high=0.02, why="within")
    record = RunRecord(
        schema=1,
        name="r",
        fusepress="0",
        target="host-cpu",
        recipe_sha256="0",
        task_sha256="1",
        checkpoint_sha256="2",
        seed=0,
        stages=[StageRecord(name="verify", status="done", measurements=[row], verdicts=[verdict])],
        artifacts={"onnx": Artifact(path="m.onnx", sha256="a" * 64)},
    )
    return record.to_json().encode()


def _manifest() -> bytes:
    from fusepress.pipeline.bundling.manifest import FileFacts, Manifest

    files = {"run.json": FileFacts(sha256="0" * 64, size=3)}
    return Manifest(fusepress="0", name="n", target="t", verdict="PASS", files=files).to_bytes()


def _archive() -> bytes:
    import tempfile

    from fusepress.pipeline.bundling.archive import write_archive

    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "f").write_bytes(b"content")
        write_archive(Path(name) / "a.tar", {"deep/f": Path(name) / "f", "g": Path(name) / "f"})
        return (Path(name) / "a.tar").read_bytes()


def _baseline() -> bytes:
    figure = {"value": 0.6, "low": 0.5, "high": 0.7}
    told = dict.fromkeys(["release", "target", "onnx_sha256", "recipe_sha256", "task_sha256", "checkpoint_sha256"], "x")
    metrics = {"miou": {"released": figure, "dense": 0.6, "drop": {"value": 0.0, "low": -0.1, "high": 0.1}}}
    return json.dumps({"schema": 1, **told, "samples": 9, "clusters": 3, "metrics": metrics}).encode()


def _replicates() -> bytes:
    buffer = io.BytesIO()
    drawn = np.linspace(0.5, 0.7, 5)
    arrays: dict[str, Any] = {"meta/schema": 1, "meta/samples": 9, "meta/clusters": 3}
    for model in ("dense", "compressed"):
        arrays |= {f"{model}/miou": drawn, f"{model}_point/miou": 0.6, f"{model}_jackknife/miou": drawn[:3]}
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def _graph() -> bytes:
    members = [{"param": "a.weight", "dim": 0, "offset": 0, "stride": 1}]
    group = {"id": "a.weight", "branch": "camera", "width": 8, "multiple": 1, "members": members, "producers": ["a"]}
    told = {"schema": 1, "groups": [group], "frozen": [], "arch_sha256": "0" * 64, "notes": [], "blocks": []}
    return json.dumps({**told, "branches": {"camera": ["camera"]}}).encode()


# ------------------------------------------------------------------------------------------------------- what reads it


def _read_recipe(path: Path) -> object:
    from fusepress.pipeline.recipe import load_recipe

    return load_recipe(path, ["prune.macs=0.5"]).sha256()


def _read_profile(path: Path) -> object:
    from fusepress.targets.profile import load_profile

    return load_profile(str(path))


def _read_measurements(path: Path) -> object:
    from fusepress.targets.fit import read_measurements

    return read_measurements(path)


def _read_plan(path: Path) -> object:
    from fusepress.pipeline.graph.plan import PrunePlan

    return PrunePlan.read(path)


def _text(path: Path) -> str:
    return path.read_bytes().decode(errors="replace")


def _read_log(path: Path) -> object:
    from fusepress.targets.trtexec import parse_banner, parse_log

    return parse_log(_text(path)).reason, parse_banner(_text(path))


def _read_times(path: Path) -> object:
    from fusepress.targets.trtexec import parse_outputs, parse_times

    parse_times(_text(path), warmup_ms=1.0)
    return parse_outputs(_text(path))


def _read_layers(path: Path) -> object:
    from fusepress.export.inspector import parse_inspection, parse_layers, parse_profile

    parse_layers(_text(path))
    parse_inspection(_text(path))
    return _error(lambda: parse_profile(_text(path).replace("LayerType", "averageMs")))


def _read_weights(path: Path) -> object:
    from torch import nn

    from fusepress.pipeline.graph.apply import load
    from fusepress.pipeline.graph.masks import load_masks

    load_masks(path)
    return load(nn.ModuleDict({"a": nn.Linear(3, 4)}), None, path)


def _read_model(path: Path) -> object:
    from fusepress.export.onnx import describe_onnx, load_onnx
    from fusepress.export.sparsity import check_sparsity_2to4

    load_onnx(path)
    check_sparsity_2to4(path)
    return describe_onnx(path)


def _read_run(path: Path) -> object:
    from fusepress.pipeline.evidence import RUN_JSON, read_run

    return read_run(path.rename(path.with_name(RUN_JSON)).parent)


def _read_manifest(path: Path) -> object:
    from fusepress.pipeline.bundling.manifest import MANIFEST_JSON, MANIFEST_SHA256, digest_line, faults, read_manifest

    (path.parent / MANIFEST_SHA256).write_bytes(digest_line(path.read_bytes()))
    path.rename(path.with_name(MANIFEST_JSON))
    return faults(path.parent, read_manifest(path.parent))


def _read_archive(path: Path) -> object:
    from fusepress.pipeline.bundling.verify import verify_bundle

    found = verify_bundle(path)
    assert not found.ok, "there is no manifest in it"
    return found


def _read_baseline(path: Path) -> object:
    from fusepress.pipeline.gates import load_baseline

    return load_baseline(path)


def _read_replicates(path: Path) -> object:
    from fusepress.pipeline.gates import load_replicates, metric_intervals

    return metric_intervals(load_replicates(path))


def _read_graph(path: Path) -> object:
    from fusepress.pipeline.graph.files import load_graph

    return load_graph(path)


FILES: dict[str, tuple[Callable[[], bytes], Reader]] = {
    "recipe": (_recipe, _read_recipe),
    "plan": (_plan, _read_plan),
    "profile": (_profile, _read_profile),
    "measurements": (lambda: b"target: jetson-agx-orin-64gb\nrows:\n- {onnx: m.onnx, ms: 1.0}\n", _read_measurements),
    "trtexec log": (_log, _read_log),
    "trtexec times": (_times, _read_times),
    "engine layers": (_layers, _read_layers),
    "checkpoint": (_weights, _read_weights),
    "onnx": (_model, _read_model),
    "run.json": (_run_json, _read_run),
    "manifest": (_manifest, _read_manifest),
    "bundle": (_archive, _read_archive),
    "baseline": (_baseline, _read_baseline),
    "replicates": (_replicates, _read_replicates),
    "groups": (_graph, _read_graph),
}
AS_JSON = [name for name, (make, _) in FILES.items() if make()[:1] in (b"{", b"[")]
AS_YAML = ["recipe", "profile", "measurements"]
valid = functools.cache(lambda name: FILES[name][0]())


def _try(name: str, content: bytes, folder: Path) -> None:
    import shutil

    home = folder / "fuzz"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir()
    path = home / f"file{'.yaml' if name in AS_YAML else ''}"
    path.write_bytes(content)
    said = _error(lambda: FILES[name][1](path))
    assert said is None or "expected " in said


def _error(read: Callable[[], object]) -> str | None:
    """What a reader says; any other exception than ours goes on and fails the test."""
    try:
        read()
    except FusepressError as error:
        return str(error)
    return None


@st.composite
def changed_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Some places of a file overwritten, cut out, doubled or filled, or something else altogether."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=200))
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(data)))
        what = draw(st.sampled_from(["put", "cut", "insert", "end"]))
        if what == "put":
            data[place : place + 1] = bytes([draw(st.integers(0, 255))])
        elif what == "cut":
            del data[place : place + draw(st.integers(1, 40))]
        elif what == "insert":
            data[place:place] = draw(st.binary(min_size=1, max_size=12) | st.sampled_from([b"\x00", b"9" * 5000, b"["]))
        else:
            del data[place:]
    return bytes(data)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([10**400, -1, 1e308, "", "../x", "nan", "a" * 300, "0" * 64]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def changed_values(draw: st.DrawFn, value: Any) -> Any:
    """A tree with one value replaced, removed or added."""
    if draw(st.integers(0, 3)) == 0 or not isinstance(value, dict | list) or not value:
        return draw(VALUES)
    if isinstance(value, list):
        place = draw(st.integers(0, len(value) - 1))
        return [*value[:place], draw(changed_values(value[place])), *value[place + 1 :]]
    key = draw(st.sampled_from(sorted(value, key=str)))
    what = draw(st.integers(0, 5))
    if what == 0:
        return {k: v for k, v in value.items() if k != key}
    if what == 1:
        return {**value, draw(st.text(max_size=6) | st.integers()): draw(VALUES)}
    return {**value, key: draw(changed_values(value[key]))}


def _bytes_of(name: str, data: st.DataObject, folder: Path) -> None:
    _try(name, data.draw(changed_bytes(valid(name))), folder)


def _tree_of(name: str, data: st.DataObject, folder: Path) -> None:
    if name in AS_YAML:
        tree = data.draw(changed_values(yaml.safe_load(valid(name))))
        _try(name, yaml.safe_dump(tree).encode(errors="surrogatepass"), folder)
    else:
        tree = data.draw(changed_values(json.loads(valid(name))))
        _try(name, json.dumps(tree).encode(), folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.mark.parametrize("name", FILES)
def test_what_is_changed_here_is_read_as_it_is(name: str, folder: Path) -> None:
    """Otherwise nothing behind the first check would be tried. (A bundle without a manifest is never whole.)"""
    path = folder / f"whole{'.yaml' if name in AS_YAML else ''}"
    path.write_bytes(valid(name))
    said = _error(lambda: FILES[name][1](path))
    assert (said is None) == (name not in {"checkpoint", "measurements", "trtexec times"}), said


HARD = [
    b"a: 2024-13-45",
    b"a: 0b_",
    b"a: " + b"9" * 5000,
    b"[" * 3000,
    b"a: &a [*a]",
    b"? [a]\n: b",
    b"inherits: nothing",
    b"inherits: [1]",
    b"gates: {robustness: {camera_blank: {max_extra_dro: 1}}}",
    b"finetune: {distill: {weights: {a: {b: 1}}}}",
    b"target: 5",
    b"\xff",
]


@pytest.mark.parametrize("name", AS_YAML)
@pytest.mark.parametrize("content", HARD)
def test_what_yaml_stumbles_over(name: str, content: bytes, folder: Path) -> None:
    _try(name, content, folder)


@pytest.mark.parametrize("content", HARD)
def test_overrides_that_yaml_stumbles_over(content: bytes, folder: Path) -> None:
    _override(("seed", content.decode(errors="replace")), folder)


@pytest.mark.parametrize("name", AS_JSON)
@pytest.mark.parametrize("content", [b"[" * 100_000, b"9" * 5000, b"NaN", b"{}", b"[1]", b'"\\ud800"', b"\xff"])
def test_what_json_stumbles_over(name: str, content: bytes, folder: Path) -> None:
    _try(name, content, folder)


@pytest.mark.parametrize(
    ("name", "change"),
    [("plan", {"removed_blocks": [[]]}), ("groups", {"branches": []}), ("engine layers", {"Bindings": None})],
)
def test_values_that_were_stumbled_over(name: str, change: dict[str, Any], folder: Path) -> None:
    _try(name, json.dumps({**json.loads(valid(name)), **change}).encode(), folder)


@pytest.mark.parametrize("name", FILES)
@settings(QUIET, max_examples=FEW)
@given(data=st.data())
def test_changed_bytes(name: str, folder: Path, data: st.DataObject) -> None:
    _bytes_of(name, data, folder)


@pytest.mark.parametrize("name", [*AS_JSON, *AS_YAML])
@settings(QUIET, max_examples=FEW)
@given(data=st.data())
def test_changed_values(name: str, folder: Path, data: st.DataObject) -> None:
    _tree_of(name, data, folder)


@settings(QUIET, max_examples=FEW)
@given(text=st.text(max_size=30) | st.tuples(st.sampled_from(["prune.macs", "gates.floors", "a.b.c", ""]), VALUES))
def test_any_override(text: str | tuple[str, Any], folder: Path) -> None:
    _override(text, folder)


def _override(text: str | tuple[str, Any], folder: Path) -> None:
    from fusepress.pipeline.recipe import load_recipe

    path = folder / "recipe.yaml"
    path.write_bytes(valid("recipe"))
    given_text = text if isinstance(text, str) else f"{text[0]}={text[1]}"
    said = _error(lambda: load_recipe(path, [given_text]))
    assert said is None or "expected " in said


@pytest.mark.long
@pytest.mark.parametrize("name", FILES)
@settings(QUIET, max_examples=MANY, derandomize=False)
@given(data=st.data())
def test_many_changed_bytes(name: str, folder: Path, data: st.DataObject) -> None:
    _bytes_of(name, data, folder)


@pytest.mark.long
@pytest.mark.parametrize("name", [*AS_JSON, *AS_YAML])
@settings(QUIET, max_examples=MANY, derandomize=False)
@given(data=st.data())
def test_many_changed_values(name: str, folder: Path, data: st.DataObject) -> None:
    _tree_of(name, data, folder)


@pytest.mark.long
@settings(QUIET, max_examples=MANY, derandomize=False)
@given(text=st.text(max_size=60) | st.tuples(st.text(max_size=20), VALUES))
def test_many_overrides(text: str | tuple[str, Any], folder: Path) -> None:
    _override(text, folder)
