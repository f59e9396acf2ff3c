"""Fitting the prediction: it finds what made the rows, its intervals hold what they promise, and an overlay wins."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from fusepress.pipeline.cli import cli, run
from fusepress.pipeline.errors import TargetError
from fusepress.targets.fit import (
    PRIORS,
    FitRow,
    Fitted,
    conformal_factor,
    devices_of_several_families,
    fit_rows,
    interval_widths,
    leave_out,
    measured_rows,
    overlay_text,
    read_measurements,
    refine,
)
from fusepress.targets.kernels import Constants
from fusepress.targets.network import read_network
from fusepress.targets.predict import predict_latency
from fusepress.targets.profile import load_profile
from fusepress.targets.roofline import constants_of
from fusepress.targets.work import describe_work

ORIN = load_profile("jetson-agx-orin-64gb")


def convolutions(width: int, size: int, depth: int) -> bytes:
    """A chain of 3 x 3 convolutions with ReLU."""
    weights = [numpy_helper.from_array(np.ones((width, width, 3, 3), np.float32), f"w{i}") for i in range(depth)]
    nodes = []
    for i in range(depth):
        nodes.append(helper.make_node("Conv", [f"x{i}", f"w{i}"], [f"y{i}"], pads=[1] * 4, kernel_shape=[3, 3]))
        nodes.append(helper.make_node("Relu", [f"y{i}"], [f"x{i + 1}"]))
    shape = [1, width, size, size]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x0", f"x{depth}")]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], weights)
    return bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]).SerializeToString())


def rows_of(truth: Constants, offsets: dict[str, float]) -> list[FitRow]:
    """Rows that constants and offsets make, without noise."""
    fitted = Fitted(constants=truth, stream_ms=0.0045, offset_ms=offsets)
    rows = []
    for family, (width, size) in {"wide": (256, 40), "thin": (16, 160), "tiny": (32, 8), "deep": (128, 20)}.items():
        graph = read_network(convolutions(width, size, 6))
        for source in offsets:
            row = FitRow(
                network=family,
                family=family,
                profile=ORIN,
                mode="MAXN",
                precision="fp16",
                ms=1.0,
                source=source,
                cuda_graph=source == "graph",
                graph=graph,
                work=describe_work(graph, "fp16"),
            )
            rows.append(replace(row, ms=fitted.predict(row)))
    return rows


@pytest.fixture(scope="module")
def truth() -> Constants:
    values = {name: centre for name, (centre, _) in PRIORS.items()}
    return Constants(**values | {"compute_fp16": 0.6, "memory": 0.65, "launch_cycles": 3000.0})


def test_a_fit_finds_what_the_harness_costs_apart_from_what_the_kernels_cost(truth: Constants) -> None:
    rows = rows_of(truth, {"graph": 0.05, "python": 0.9})
    fitted = fit_rows(rows)
    assert fitted.offset_ms["python"] > 3 * fitted.offset_ms["graph"]
    assert all(abs(fitted.log_error(row)) < 0.03 for row in rows)
    before = Fitted(constants=Constants(**{n: c for n, (c, _) in PRIORS.items()}), stream_ms=0.0045, offset_ms={})
    assert max(abs(before.log_error(row)) for row in rows) > 0.1


def test_held_out_families_are_not_in_their_own_fit(truth: Constants) -> None:
    rows = rows_of(truth, {"graph": 0.05})
    spoilt = [replace(row, ms=5 * row.ms) if row.family == "tiny" else row for row in rows]
    errors = leave_out(spoilt, lambda row: row.family)
    assert set(errors) == {"wide", "thin", "tiny", "deep"}
    assert errors["tiny"][0] < math.log(1 / 2.5)  # the fit without it cannot follow
    assert leave_out([row for row in rows if row.family == "wide"], lambda row: row.family) == {}
    with pytest.raises(TargetError, match=r"expected measured latencies to fit; got none"):
        fit_rows([])


def test_interval_of_known_errors() -> None:
    errors = [0.1 * k for k in range(1, 10)]
    assert conformal_factor(errors, 0.9) == pytest.approx(math.exp(0.9))  # rank 9 of 9
    assert conformal_factor([-e for e in errors], 0.5) == pytest.approx(math.exp(0.5))
    assert conformal_factor(errors[:8], 0.9) is None  # rank 9 of 8
    assert conformal_factor([], 0.9) is None


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(errors=st.lists(st.floats(-2, 2), min_size=2, max_size=40, unique_by=abs), coverage=st.floats(0.3, 0.9))
def test_intervals_hold_at_least_the_promised_share_of_exchangeable_errors(
    errors: list[float], coverage: float
) -> None:
    """Each error in turn against the interval of the others: the counting argument behind conformal prediction."""
    inside = 0
    for index, error in enumerate(errors):
        factor = conformal_factor(errors[:index] + errors[index + 1 :], coverage)
        inside += factor is None or abs(error) <= math.log(factor) + 1e-12
    assert inside >= coverage * len(errors) - 1e-9


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    """A file of measurements, twice what the committed constants say, with times of trtexec for one row."""
    rows = []
    for name, (width, size) in {"a": (64, 40), "b": (128, 40), "c": (32, 80)}.items():
        (tmp_path / f"{name}.onnx").write_bytes(convolutions(width, size, 4))
        ms = 2 * predict_latency(tmp_path / f"{name}.onnx", ORIN, "fp16").latency_ms
        row = {"onnx": f"{name}.onnx", "precision": "fp16", "cuda_graph": True}
        if name == "a":
            queries = [{"computeMs": ms * f} for f in (0.9, 1.0, 3.0)]
            (tmp_path / "a.json").write_text(json.dumps(queries))
            rows.append({**row, "times": "a.json"})
        else:
            rows.append({**row, "compute_ms": ms})
    path = tmp_path / "measured.yaml"
    path.write_text(yaml.safe_dump({"schema": 1, "target": ORIN.name, "rows": rows}))
    return path


def test_times_of_trtexec_count_with_their_median(measured: Path) -> None:
    rows = measured_rows(read_measurements(measured), measured.parent, ORIN)
    assert rows[0].ms == pytest.approx(2 * rows[0].gpu_ms(constants_of(ORIN).constants))
    assert [row.mode for row in rows] == ["MAXN"] * 3


@pytest.fixture(scope="module")
def row(truth: Constants) -> FitRow:
    return rows_of(truth, {"graph": 0.05})[0]


def errors_on(row: FitRow, **errors: dict[str, list[float]]) -> list[tuple[FitRow, float]]:
    """Rows with errors, by device and family."""
    return [
        (replace(row, profile=ORIN.model_copy(update={"name": device}), family=family), error)
        for device, by_family in errors.items()
        for family, values in by_family.items()
        for error in values
    ]


def test_each_kind_of_hold_out_has_a_quantile_of_its_own(row: FitRow) -> None:
    near, far = [0.1] * 9, [0.8] * 9
    by_family = errors_on(row, two={"a": near, "b": near}, one={"c": far})
    by_device = errors_on(row, two={"a": [-0.3] * 9, "b": [0.3] * 9}, one={"c": far})
    several = devices_of_several_families(row for row, _ in by_family)
    assert several == {"two"}  # when family c is held out, the device named one is not in the fit either
    widths = interval_widths(by_family, by_device, several)
    assert widths is not None
    assert widths.of("two") == pytest.approx(0.1)  # the errors on a device that went with its family are none of it
    assert widths.of("one") == widths.of("unheard") == pytest.approx(math.hypot(0.1, 0.8))
    few = interval_widths(by_family[:8], by_device, several)  # too few for 90 %
    assert few is not None
    assert few.of("two") == few.of("one") == pytest.approx(0.8)
    assert interval_widths(by_family, by_device[:8], several) is None


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_intervals_of_both_kinds_hold_what_they_promise(row: FitRow, seed: int) -> None:
    """Errors of one device and one family each, alike in kind: of the next ones, 90 % lie inside on average."""
    random = np.random.default_rng(seed)
    own, device = random.normal(0, 0.1, 99), random.normal(0, 0.3, 99)
    rows = errors_on(row, two={f"{k}": [float(e)] for k, e in enumerate(own)})
    widths = interval_widths(rows, errors_on(row, two={"x": [float(e) for e in device]}), frozenset(["two"]))
    assert widths is not None
    inside = np.mean(np.abs(random.normal(0, 0.1, 4000)) <= widths.known)
    assert 0.75 <= inside <= 1.0  # beta(90, 10), 5 standard deviations away from 0.9
    both = random.normal(0, 0.1, 4000) + random.normal(0, 0.3, 4000)
    assert 0.75 <= np.mean(np.abs(both) <= widths.other) <= 1.0


def test_a_target_file_is_found_beside_the_measurements(measured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (measured.parent / "board.yaml").write_text("schema: 1\nname: board\ninherits: jetson-agx-orin-64gb\n")
    measured.write_text(measured.read_text().replace(ORIN.name, "board.yaml"))
    monkeypatch.chdir(measured.parent.parent)
    result = CliRunner().invoke(cli, ["targets", "fit", f"{measured.parent.name}/{measured.name}", "--out", "own.yaml"])
    assert result.exit_code == 0, result.output
    assert load_profile(Path("own.yaml")).name == "board"
    measured.write_text(measured.read_text().replace("board.yaml", "nowhere.yaml"))
    assert run(["targets", "fit", str(measured)]) == 2


def test_measurements_in_another_encoding_are_refused(measured: Path) -> None:
    measured.write_bytes("schema: 1  # Böden\n".encode("latin-1"))
    with pytest.raises(TargetError, match=r"expected YAML in UTF-8; got a file .*measured.yaml \(.*codec can't decode"):
        read_measurements(measured)


def test_measurements_of_ones_own_win_beside_the_recipe(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = CliRunner().invoke(cli, ["targets", "fit", str(measured), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert found["error_held_out"] < 0.7 * found["error_before"]
    assert found["calibrated"] is False  # three rows are too few for 90 %
    own = load_profile(ORIN.name, base=measured.parent)
    assert own.power_modes == ORIN.power_modes  # inherited
    assert own.latency is not None
    graph = measured.parent / "b.onnx"
    ours, theirs = predict_latency(graph, own, "fp16"), predict_latency(graph, ORIN, "fp16")
    assert ours.latency_ms > 1.4 * theirs.latency_ms
    assert ours.low_ms < 2 * theirs.latency_ms < ours.high_ms
    assert run(["targets", "fit", str(measured)]) == 2
    assert "expected a new file" in capsys.readouterr().err


@pytest.mark.parametrize("name", [ORIN.name, "my-board"])
def test_a_board_of_ones_own_keeps_what_is_its_own(measured: Path, name: str) -> None:
    mode = ORIN.mode().model_copy(update={"dram_gbps": 100.0})
    changes = {"name": name, "power_modes": {**ORIN.power_modes, ORIN.default_mode: mode}, "declared": ()}
    board = ORIN.model_copy(update=changes)
    rows = measured_rows(read_measurements(measured), measured.parent, board)[:1]
    path = measured.parent / "own.yaml"
    path.write_text(overlay_text(board, refine(rows, board), "fit", rows))
    found = load_profile(path)
    assert found.latency is not None
    assert found.model_copy(update={"latency": None}) == board


def test_one_family_says_that_it_cannot_be_held_out(measured: Path) -> None:
    given_rows = measured_rows(read_measurements(measured), measured.parent, ORIN)
    fit = refine([replace(row, family="one") for row in given_rows], ORIN)
    assert fit.log_errors == {}
    assert fit.calibrated is False
    assert fit.latency["known"] >= constants_of(ORIN).known


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": []}, r"got .*at .*measured\.yaml: rows; see docs/latency\.md"),
        ({"rows": [{"onnx": "a.onnx", "precision": "fp16", "cuda_graph": True}]}, "give one of `times` and"),
        ({"rows": [{"onnx": "a.onnx", "precision": "int4", "cuda_graph": True, "compute_ms": 1}]}, "rows.0.precision"),
        ({"rowz": 1}, "rowz"),
    ],
)
def test_measurements_that_are_not_are_refused(measured: Path, change: dict[str, object], message: str) -> None:
    measured.write_text(yaml.safe_dump(yaml.safe_load(measured.read_text()) | change))
    with pytest.raises(TargetError, match=message):
        read_measurements(measured)


def test_times_that_are_not_are_refused(measured: Path) -> None:
    given_rows = read_measurements(measured)
    for text, message in (("[]", "got 0 queries"), ("{}", "got 0 queries"), ('[{"ms": 1}]', "with computeMs")):
        (measured.parent / "a.json").write_text(text)
        with pytest.raises(TargetError, match=message):
            measured_rows(given_rows, measured.parent, ORIN)
    (measured.parent / "a.json").unlink()
    with pytest.raises(TargetError, match=r"expected times of trtexec; got none at .*a\.json"):
        measured_rows(given_rows, measured.parent, ORIN)
    with pytest.raises(TargetError, match=r"expected a file of measured latencies; got none at"):
        read_measurements(measured.parent / "nowhere.yaml")


def test_a_cpu_is_measured_not_fitted() -> None:
    with pytest.raises(TargetError, match="expected a target with a GPU; got host-cpu"):
        refine([], load_profile("host-cpu"))
