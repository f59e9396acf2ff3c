"""Bundles that were forged by someone who can write anything but a signature."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from fusepress.pipeline.bundling.check import Check
from fusepress.pipeline.bundling.make import make_bundle
from fusepress.pipeline.bundling.manifest import (
    MANIFEST_JSON,
    MANIFEST_SHA256,
    Manifest,
    digest_line,
    list_files,
    read_manifest,
)
from fusepress.pipeline.bundling.model import CHECKS, check_models
from fusepress.pipeline.bundling.reproduce import reproduce_bundle
from fusepress.pipeline.bundling.verify import Verified, check_folder, exit_code
from fusepress.pipeline.errors import StoreError
from fusepress.pipeline.evidence import Artifact, RunRecord, StageRecord, read_run
from fusepress.pipeline.gates import Condition, Replicates, judge, overall, save_replicates
from fusepress.pipeline.recipe import Recipe
from fusepress.pipeline.text import verified_lines

RECIPE = {"task": "task.py:T", "checkpoint": "dense.safetensors", "gates": {"floors": {"m": 0.5}}}
FILES = {"onnx": "model.onnx", "replicates": "replicates.npz", "references": "references.safetensors"}


def _doubled(extra: list[onnx.NodeProto] | None = None) -> onnx.ModelProto:
    """y = 2 x, two numbers a sample."""
    nodes = [helper.make_node("Mul", ["x", "two"], ["y"]), *(extra or [])]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 2]) for name in ("x", "y")]
    two = numpy_helper.from_array(np.array([2.0], np.float32), "two")
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], [two])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def _forge(
    folder: Path,
    *,
    model: onnx.ModelProto | None = None,
    released: str = "model.onnx",
    tensors: dict[str, np.ndarray] | None = None,
) -> dict[str, Check]:
    """Write a bundle whose hashes all fit, and check it."""
    (folder / released).write_bytes((model or _doubled()).SerializeToString())
    x = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
    save_file({"inputs/x": x, "outputs/y": 2 * x} if tensors is None else tensors, folder / FILES["references"])
    return _sealed(folder, FILES | {"onnx": released})


def _sealed(folder: Path, files: dict[str, str]) -> dict[str, Check]:
    sha = hashlib.sha256((folder / files["onnx"]).read_bytes()).hexdigest()
    drawn = np.full((100, 2), 0.9) + 0.001 * np.random.default_rng(0).normal(size=(100, 2))
    clean = Condition(dense={"m": 0.9}, compressed={"m": 0.9}, replicates={"m": drawn})
    replicates = Replicates(clean=clean, samples=100, clusters=50, artifact_sha256=sha)
    save_replicates(folder / files["replicates"], replicates)
    record = RunRecord(
        schema=1,
        name="forged",
        fusepress="0",
        target="host-cpu",
        recipe_sha256="0",
        task_sha256="1",
        checkpoint_sha256="2",
        seed=0,
        target_profile={"precision": "fp32"},
        task={"metrics": {"m": "max"}},
        artifacts={
            name: Artifact(path=path, sha256=hashlib.sha256((folder / path).read_bytes()).hexdigest())
            for name, path in files.items()
        },
    )
    recipe = Recipe.model_validate(RECIPE)
    verdicts = judge(record, replicates, recipe.gates, {"m": "max"})
    record.stages = [StageRecord(name="verify", status="done", verdicts=verdicts)]
    record.verdict, record.why = overall(verdicts)
    return _listed(folder, record, recipe)


def _listed(folder: Path, record: RunRecord, recipe: Recipe) -> dict[str, Check]:
    (folder / "run.json").write_text(record.to_json())
    (folder / "recipe.json").write_text(recipe.model_dump_json())
    paths = {p.name: p for p in sorted(folder.iterdir()) if p.name not in (MANIFEST_JSON, MANIFEST_SHA256)}
    assert record.verdict is not None
    manifest = Manifest(
        fusepress="0", name=record.name, target=record.target, verdict=record.verdict, files=list_files(paths)
    ).to_bytes()
    (folder / MANIFEST_JSON).write_bytes(manifest)
    (folder / MANIFEST_SHA256).write_bytes(digest_line(manifest))
    return {check.name: check for check in check_folder(folder, None).checks}


def test_a_whole_bundle_passes(tmp_path: Path) -> None:
    found = _forge(tmp_path)
    assert {name for name, check in found.items() if check.status == "ok"} == {
        "hashes",
        "run record",
        "verdict",
        "onnx",
        "parity",
    }


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_references_that_no_output_differs_from_are_refused(tmp_path: Path, wrong: float) -> None:
    x = np.array([[1.0, 2.0]], np.float32)
    found = _forge(tmp_path, tensors={"inputs/x": x, "outputs/y": np.array([[wrong, 99.0]], np.float32)})
    assert found["parity"].status == "failed"
    assert "expected finite reference outputs of at least one sample" in found["parity"].why


def test_references_of_no_sample_are_refused(tmp_path: Path) -> None:
    nothing = np.zeros((0, 2), np.float32)
    found = _forge(tmp_path, tensors={"inputs/x": nothing, "outputs/y": nothing})
    assert found["parity"].status == "failed"
    assert "expected finite reference outputs of at least one sample" in found["parity"].why


def test_a_released_onnx_of_another_name_is_checked_too(tmp_path: Path) -> None:
    broken = _doubled([helper.make_node("NoSuchOperator", ["x"], ["z"])])
    found = _forge(tmp_path, model=broken, released="model.bin")
    assert found["onnx"].status == "failed"
    assert found["parity"].status == "not checked", "it is not given to ONNX Runtime"


@pytest.mark.parametrize("place", ["attribute", "sparse", "function"])
def test_weights_outside_are_found_wherever_they_are_named(tmp_path: Path, place: str) -> None:
    outside = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    outside.external_data.add(key="location", value="../outside")
    constant = helper.make_node("Constant", [], ["w"], value=outside)
    model = _doubled([constant] if place == "attribute" else None)
    if place == "sparse":
        model.graph.sparse_initializer.add().values.CopyFrom(outside)
    elif place == "function":
        imports = [helper.make_opsetid("", 17)]
        model.functions.append(helper.make_function("own", "F", [], ["w"], [constant], imports))
    found = _forge(tmp_path, model=model)
    assert "expected weights within the file; got 'w' outside of it" in found["onnx"].why
    assert found["parity"].status == "not checked"
    nothing: Any = None
    with pytest.raises(StoreError, match="expected weights within the file"):
        reproduce_bundle(tmp_path, nothing)  # nor do its stages


def _endless() -> onnx.ModelProto:
    """A valid graph whose loop never ends."""
    forever = numpy_helper.from_array(np.array(2**62, np.int64), "trips")
    go = numpy_helper.from_array(np.array(True), "go")
    body = helper.make_graph(
        [helper.make_node("Identity", ["on"], ["on_out"]), helper.make_node("Abs", ["carried"], ["carried_out"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("carried", TensorProto.FLOAT, [1, 2]),
        ],
        [
            helper.make_tensor_value_info("on_out", TensorProto.BOOL, []),
            helper.make_tensor_value_info("carried_out", TensorProto.FLOAT, [1, 2]),
        ],
    )
    model = _doubled()
    model.graph.initializer.extend([forever, go])
    model.graph.node.insert(0, helper.make_node("Loop", ["trips", "go", "x"], ["looped"], body=body))
    model.graph.node[1].input[0] = "looped"
    return model


def _huge() -> onnx.ModelProto:
    """A small file of a graph that wants 4 GiB for one tensor."""
    model = _doubled()
    model.graph.initializer.append(numpy_helper.from_array(np.array([2**30], np.int64), "size"))
    nodes = [
        helper.make_node("ConstantOfShape", ["size"], ["many"]),
        helper.make_node("ReduceSum", ["many"], ["zero"], keepdims=0),
        helper.make_node("Add", ["x", "zero"], ["shifted"]),
    ]
    for place, node in enumerate(nodes):
        model.graph.node.insert(place, node)
    model.graph.node[3].input[0] = "shifted"
    return model


@pytest.mark.parametrize(
    ("make", "limits", "why"),
    [
        (_endless, {"timeout_s": 6.0}, r"expected an answer within 6 s and 8 GiB; got no answer within 6 s"),
        (_huge, {"memory_bytes": 2 << 30}, r"(?i)alloc|memory|crash|exit status"),
    ],
)
def test_a_graph_without_measure_costs_the_check_and_not_the_caller(
    tmp_path: Path, make: Callable[[], onnx.ModelProto], limits: dict[str, Any], why: str
) -> None:
    _forge(tmp_path)
    (tmp_path / FILES["onnx"]).write_bytes(make().SerializeToString())
    found = check_models(tmp_path, read_manifest(tmp_path), read_run(tmp_path), **limits)
    assert [found[name].status for name in CHECKS] == ["ok", "not checked", "failed"]
    assert re.search(why, found["parity"].why)


def _sparse(dense: bool) -> onnx.ModelProto:
    """Two convolutions, the first with the 2:4 pattern and the second with or without."""
    weights = np.ones((2, 4, 4, 1, 1), np.float32)
    weights[:, :, 2:] = 0
    if dense:
        weights[1, 0, 3] = 1
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 2, 2])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, 2, 2])
    nodes = [
        helper.make_node("Conv", ["x", "a.weight"], ["mid"], name="a/Conv"),
        helper.make_node("Conv", ["mid", "b.weight"], ["y"], name="b/Conv"),
    ]
    constants = [numpy_helper.from_array(w, f"{name}.weight") for name, w in zip("ab", weights, strict=True)]
    graph = helper.make_graph(nodes, "g", [x], [y], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


@pytest.mark.parametrize(
    ("dense", "told", "status", "why"),
    [
        (False, {"masked_confirmed": 2, "masked_not_exported": []}, "ok", "2 layers of the released ONNX are 2:4"),
        (True, {"masked_confirmed": 2, "masked_not_exported": []}, "failed", "got it in 1, not in 'b.weight'"),
        (True, {"masked_confirmed": 1, "masked_not_exported": []}, "failed", "got it in 1, not in 'b.weight'"),
        (False, {"masked_confirmed": 3, "masked_not_exported": []}, "failed", "the 3 masked layers .* got it in 2,"),
        (False, {}, "failed", "expected run.json to tell which layers are 2:4"),
    ],
)
def test_every_layer_that_the_record_calls_2to4_is_looked_at(
    tmp_path: Path, dense: bool, told: dict[str, Any], status: str, why: str
) -> None:
    """One layer with the pattern was enough."""
    _forge(tmp_path)
    mask = np.ones((4, 4, 1, 1), np.uint8)
    mask[:, 2:] = 0
    masks = {"a.weight": mask, "b.weight": mask}
    save_file(masks, tmp_path / "masks.safetensors")
    save_file({name: m.astype(np.float32) for name, m in masks.items()}, tmp_path / "weights.safetensors")
    (tmp_path / FILES["onnx"]).write_bytes(_sparse(dense).SerializeToString())
    record = read_run(tmp_path)
    for name, path in (("masks", "masks.safetensors"), ("checkpoint", "weights.safetensors")):
        record.artifacts[name] = Artifact(path=path, sha256="0" * 64)
    record.stages.append(StageRecord(name="export", details={"sparsity": told}))
    checks = ("onnx", "masks")
    found = check_models(tmp_path, read_manifest(tmp_path), record, wants_2to4=True, checks=checks)
    assert found["masks"].status == status
    assert re.search(why, found["masks"].why)


def test_a_refused_release_is_told_first_and_by_the_exit_code() -> None:
    for verdict, code in (("PASS", 0), ("FAIL", 3), ("INCONCLUSIVE", 4), ("ANOMALOUS", 4)):
        whole = Verified(name="r", verdict=verdict, checks=(Check("hashes", "ok", "fine"),))
        assert exit_code(whole) == code
        assert exit_code(whole, "fail") == (3 if verdict == "FAIL" else 0)
        assert verified_lines(whole)[0].startswith("r: every check passed" if code else "ok")
        broken = Verified(name="r", verdict=verdict, checks=(Check("hashes", "failed", "no"),))
        assert exit_code(broken, "fail") == 5
        assert verified_lines(broken)[0].startswith("r: do not use it")


def test_a_run_without_references_is_refused(tmp_path: Path) -> None:
    _forge(tmp_path)
    record = RunRecord.model_validate_json((tmp_path / "run.json").read_text())
    del record.artifacts["references"]
    found = _listed(tmp_path, record, Recipe.model_validate(RECIPE))
    assert "got no references" in found["run record"].why


@pytest.mark.parametrize("change", [{"limit": 0.8}, {"value": 0.95}, {"high": 0.99}, {"verdict": "INCONCLUSIVE"}])
def test_a_verdict_with_other_figures_is_found(tmp_path: Path, change: dict[str, float]) -> None:
    """`limit` 0.8 for a floor that was 0.5 would make the release look better than it was asked to be."""
    assert _forge(tmp_path)["verdict"].status == "ok"
    record = RunRecord.model_validate_json((tmp_path / "run.json").read_text())
    stage = record.stages[0]
    stage.verdicts = [stage.verdicts[0].model_copy(update=change)]
    found = _listed(tmp_path, record, Recipe.model_validate(RECIPE))
    assert "got others at floors.m" in found["verdict"].why


def test_a_verdict_that_is_told_twice_is_found(tmp_path: Path) -> None:
    _forge(tmp_path)
    record = RunRecord.model_validate_json((tmp_path / "run.json").read_text())
    record.stages[0].verdicts *= 2
    assert _listed(tmp_path, record, Recipe.model_validate(RECIPE))["verdict"].status == "failed"


def test_a_verdict_by_other_gates_than_the_recipes_is_not_bundled(tmp_path: Path) -> None:
    """As `fusepress gate RUN -o gates.floors.m=0.5` leaves it where the recipe says 0.95: nobody is to sign that."""
    run = tmp_path / "run"
    run.mkdir()
    _forge(run)
    for name in (MANIFEST_JSON, MANIFEST_SHA256):
        (run / name).unlink()
    assert make_bundle(run).manifest.verdict == "PASS"
    path = run / "recipe.json"
    path.write_text(path.read_text().replace('"m":0.5', '"m":0.95'))
    with pytest.raises(
        StoreError, match=r"got others at floors\.m: judged again it is FAIL, run\.json says PASS; run `f"
    ):
        make_bundle(run)
    path.unlink()
    with pytest.raises(StoreError, match=r"expected the resolved recipe; got .* at recipe\.json; run compress again"):
        make_bundle(run)


def test_a_folder_in_the_place_of_a_file_is_a_failed_check(tmp_path: Path) -> None:
    _forge(tmp_path)
    (tmp_path / "run.json").rename(tmp_path / "x")
    (tmp_path / "run.json").mkdir()
    (tmp_path / "x").rename(tmp_path / "run.json/x")
    manifest = Manifest(
        fusepress="0", name="n", target="t", verdict="PASS", files=list_files({"run.json/x": tmp_path / "run.json/x"})
    ).to_bytes()
    for path in tmp_path.glob("*.*"):
        if path.is_file():
            path.unlink()
    (tmp_path / MANIFEST_JSON).write_bytes(manifest)
    (tmp_path / MANIFEST_SHA256).write_bytes(digest_line(manifest))
    found = {check.name: check.status for check in check_folder(tmp_path, None).checks}
    assert found == {"hashes": "ok", "signature": "not checked", "run record": "failed"}


def test_what_a_bundle_says_of_itself_begins_no_line_of_its_own() -> None:
    check = Check("parity", "failed", "x\x1b[2K\rok")
    lines = verified_lines(Verified(name="a\nok          signature  yours", verdict="FAIL", checks=(check,)))
    assert all(line.isprintable() for line in lines)
    assert lines[-1] == "a?ok          signature  yours: do not use it; its verdict is FAIL"
