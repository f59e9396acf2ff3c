"""The benchmarks of quantisation: their changes keep the network, their cells are made once, their tables are right."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from fusepress.export.inspector import EngineLayer
from fusepress.export.node_times import NodeTime
from fusepress.pipeline.evaluate import Evaluation
from tests.onnx_graphs import Graph

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module", autouse=True)
def importable() -> Iterator[None]:
    """`benchmarks` is a folder of the checkout, not of the installed package."""
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(ROOT))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def street() -> Any:
    from benchmarks.quantize.networks import network

    return network("street", multi=Path(), depth=Path(), data=None)


def test_unlike_channels_are_the_same_network_to_the_last_bit(street: Any) -> None:
    from benchmarks.quantize.networks import GAIN, make_unlike
    from fusepress.pipeline.task import first_batch

    plain, unlike = street.model(), street.model()
    make_unlike(unlike)
    batch = first_batch(street.task, "calib", size=1)
    seen: dict[str, torch.Tensor] = {}
    for name, model in (("plain", plain), ("unlike", unlike)):
        model.camera.stage1[0].first.register_forward_hook(lambda _, __, out, n=name: seen.update({f"camera {n}": out}))
        model.lidar.register_forward_hook(lambda _, __, out, n=name: seen.update({f"lidar {n}": out}))
    with torch.no_grad():
        outputs = [model(**batch.inputs) for model in (plain, unlike)]
    assert torch.equal(*outputs)
    assert torch.equal(seen["camera unlike"][:, 0], GAIN * seen["camera plain"][:, 0])
    assert torch.equal(seen["camera unlike"][:, 1:], seen["camera plain"][:, 1:])
    assert torch.equal(seen["lidar unlike"], GAIN * seen["lidar plain"])
    assert float(seen["lidar plain"].max()) > 0


def test_a_finished_cell_is_not_made_again_and_another_network_has_its_own(street: Any, tmp_path: Path) -> None:
    from benchmarks.quantize.files import Bench
    from benchmarks.quantize.networks import network

    made: list[int] = []

    def make() -> dict[str, Any]:
        made.append(1)
        return {"value": len(made)}

    bench = Bench(network=street, store=tmp_path, samples=4, threads=1)
    assert not bench.has("max")
    assert [bench.cell("max", make) for _ in range(2)] == [{"value": 1}] * 2
    assert bench.has("max")
    again = Bench(network=street, store=tmp_path, samples=4, threads=1)
    assert again.cell("max", make) == {"value": 1}
    other = network("street_unlike", multi=Path(), depth=Path(), data=None)
    keys = {Bench(network=n, store=tmp_path, samples=s, threads=1).key for n in (street, other) for s in (4, 5)}
    assert len(keys) == 4


def test_a_file_that_was_interrupted_is_made_anew(street: Any, tmp_path: Path) -> None:
    from benchmarks.quantize.files import Bench

    bench = Bench(network=street, store=tmp_path, samples=4, threads=1)

    def fail(path: Path) -> None:
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench.file("a.onnx", fail)
    assert bench.file("a.onnx", lambda path: path.write_text("whole")).read_text() == "whole"


def test_what_is_lost_is_positive_whichever_way_the_metric_goes() -> None:
    from benchmarks.quantize.methods import against_float

    def of(errors: list[float]) -> Evaluation:
        names = tuple(f"s{i}" for i in range(len(errors)))
        stats = {"error": np.asarray(errors)}
        return Evaluation(stats=stats, sample_ids=names, groups=names, metrics={"m": float(np.mean(errors))})

    errors = np.linspace(1, 2, 40)
    task = SimpleNamespace(primary="m", metrics={"m": "min"}, score=lambda stats: {"m": float(np.mean(stats["error"]))})
    row = against_float(task, of(list(errors)), of(list(errors * 1.1)))
    assert row["relative_drop"] == pytest.approx(0.1)
    assert row["drop"] == pytest.approx(0.15)
    assert row["drop_low"] < row["drop"] < row["drop_high"]
    task.metrics = {"m": "max"}
    assert against_float(task, of(list(errors)), of(list(errors * 1.1)))["relative_drop"] == pytest.approx(-0.1)


def test_layers_with_qdq_are_counted_by_what_the_engine_lists(tmp_path: Path) -> None:
    from benchmarks.quantize.engines import UNLISTED, counted, layers_of

    graph = Graph()
    x = graph.conv_int8(graph.quantized(graph.input("x", [1, 8, 4, 4]), "q"), (8, 8), "a")
    x = graph.conv_int8(graph.quantized(x, "p"), (8, 8), "b")
    graph.output(graph.conv(x, (8, 8), "c"))
    low, other = layers_of(graph.save(tmp_path / "m.onnx"))
    assert (low, other) == ({"a": "Conv", "b": "Conv"}, {"c": "Conv"})
    layers = [
        EngineLayer(name="k", type="correlation", precision="int8", nodes=("a",)),
        EngineLayer(name="r", type="Reformat", precision="fp32", nodes=("b",)),
        EngineLayer(name="l", type="correlation", precision="fp16", nodes=("c",)),
    ]
    assert counted(low, layers) == {"Conv int8": 1, f"Conv {UNLISTED}": 1}
    assert counted(other, layers) == {"Conv fp16": 1}


def test_nodes_are_summed_by_kind_and_operator() -> None:
    from benchmarks.quantize.latency import summed

    nodes = [NodeTime(name=str(i), op=op, ms=i + 1.0) for i, op in enumerate(["QLinearConv", "Conv", "Conv", "Resize"])]
    found = summed(nodes)
    assert found["kinds"] == {"integer": [1, 1.0], "floating": [2, 5.0], "conversion": [0, 0.0], "other": [1, 4.0]}
    assert list(found["operators"]) == ["Conv", "Resize", "QLinearConv"]
    assert [row["name"] for row in found["slowest"]] == ["3", "2", "1", "0"]


def test_modelopts_defaults_run_in_a_process_of_their_own(tmp_path: Path) -> None:
    from benchmarks.quantize.defaults import quantize_by_defaults

    graph = Graph()
    x = graph.add("Relu", graph.conv(graph.input("x", [1, 16, 16, 16]), (16, 32), "a"), name="a/Relu")
    graph.output(graph.add("Relu", graph.conv(x, (32, 32), "b"), name="b/Relu"))
    source = graph.save(tmp_path / "m.onnx")
    arrays = {"x": np.random.default_rng(0).standard_normal((2, 16, 16, 16)).astype(np.float32)}
    out = quantize_by_defaults(source, arrays, tmp_path / "q.onnx")
    assert any(node.op_type == "QuantizeLinear" for node in onnx.load(out).graph.node)
    assert not (tmp_path / "q.npz").exists()


def test_a_table_of_finished_cells_says_which_meet_the_claim() -> None:
    from benchmarks.quantize.methods import table

    row = {"method": "max", "macs_share_int8": 0.95, "fp32": 0.8, "value": 0.799, "drop": 0.001, "n": 9}
    row |= {"drop_low": -0.001, "drop_high": 0.003, "relative_drop": 0.00125}
    lost = row | {"method": "entropy", "value": 0.7, "drop": 0.1, "relative_drop": 0.125, "drop_low": None}
    few = row | {
        "method": "ladder",
        "macs_share_int8": 0.8,
        "ranges_by": "mse",
        "spared": 2,
        "units": 9,
        "excluded": ["a"],
    }
    lines = table({"net": {"metric": "miou", "rows": [row, lost, few]}})
    assert [line.split("|")[-2].strip() for line in lines[2:]] == ["yes", "no", "no"]
    assert "| ladder: mse, 2 of 9 units spared, `a` excluded |" in lines[4]
    assert "+0.0010 (-0.0010 to +0.0030)" in lines[2]
    assert json.dumps(lines)


def test_rows_of_an_earlier_result_stay_where_they_are_of_the_same_network() -> None:
    from benchmarks.quantize.methods import merged

    card = {"metric": "miou", "calibration_samples": 64, "calibration_card_sha256": "a"}

    def result(*methods: str, fp32: float = 0.8, **other: Any) -> dict[str, Any]:
        return card | other | {"rows": [{"method": method, "fp32": fp32, "of": len(methods)} for method in methods]}

    both = merged(result("modelopt"), result("ladder", "max", "modelopt", sources="old"))
    assert [(row["method"], row["of"]) for row in both["rows"]] == [("max", 3), ("modelopt", 1), ("ladder", 3)]
    assert [row.get("sources") for row in both["rows"]] == ["old", None, "old"]
    for other in (result("max", fp32=0.7), result("max", calibration_card_sha256="b"), None):
        assert [row["method"] for row in merged(result("modelopt"), other)["rows"]] == ["modelopt"]


def test_networks_of_an_earlier_result_stay_where_the_tools_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.quantize import files

    monkeypatch.setattr(files, "RESULTS", tmp_path)
    first = {"tools": {"onnx": "1"}, "networks": {"street": {"n": 1}}}
    assert files.with_earlier("decision", first) == first
    earlier = {"command": "c", "tools": {"onnx": "1"}, "networks": {"street": {"n": 1}, "kitti_depth": {"n": 2}}}
    (tmp_path / "decision.json").write_text(json.dumps(earlier))
    now: dict[str, Any] = {"tools": {"onnx": "1"}, "networks": {"multi": {"n": 4}, "street": {"n": 3}}}
    found = files.with_earlier("decision", now)["networks"]
    assert list(found.items()) == [("street", {"n": 3}), ("multi", {"n": 4}), ("kitti_depth", {"command": "c", "n": 2})]
    assert files.with_earlier("decision", now | {"tools": {"onnx": "2"}})["networks"] == now["networks"]


def test_the_decision_of_the_table_is_that_of_a_search_without_limits_and_trials_are_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of four units to blame, in a world where what each loses is known; a second run judges nothing."""
    from benchmarks.quantize import decision
    from fusepress.calib.search import Trial

    lost = {"a": 0.0, "b": 0.5, "c": 0.3, "d": 0.01}
    judged: list[frozenset[str]] = []

    class World:
        chosen = SimpleNamespace(units=lambda: {name: [name] for name in lost})
        sensitivity = SimpleNamespace(units=[SimpleNamespace(name=name, cost=1.0) for name in lost], cost_unit="MAC")
        standard = SimpleNamespace(reference=SimpleNamespace(n=7))

    def judge(_bench: Any, spared: frozenset[str]) -> Trial:
        judged.append(spared)
        drop = sum(value for name, value in lost.items() if name not in spared)
        return Trial(spared=spared, met=drop <= 0.02, drop=drop)

    monkeypatch.setattr(decision, "stored_trial", judge)
    found = decision.exhaustive(World())  # type: ignore[arg-type]
    assert (found["rung"], found["spared"]) == ("mixed", ["b", "c"])
    assert found["evaluations"] == len(judged) == len(set(judged))
    assert found["all_int8_loses"] == pytest.approx(0.81)
    assert {row["name"]: row["lost_alone"] for row in found["units"]} == pytest.approx(lost)
