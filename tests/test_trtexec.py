"""What trtexec says, read in the formats of 8.2 to 11.2, and the arguments that make versions measure the same."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusepress.pipeline.errors import ExportError, MeasureError
from fusepress.targets.trtexec import parse_banner, parse_log, parse_outputs, parse_times
from fusepress.targets.trtexec_command import tensorrt_version, trtexec_bench, trtexec_build, trtexec_outputs
from tests import trtexec_formats as formats


@pytest.mark.parametrize(
    ("number", "version", "build"),
    [
        ("v8203", "8.2.3", None),
        ("v8502", "8.5.2", None),
        ("v8601", "8.6.1", None),
        ("v100001", "10.0.1", None),
        ("v100300] [b17", "10.3.0", "17"),
        ("v101303] [b9", "10.13.3", "9"),
        ("v110100] [b106", "11.1.0", "106"),
        ("v8.6.1", "8.6.1", None),
    ],
)
def test_the_banner_tells_version_and_build(number: str, version: str, build: str | None) -> None:
    found = parse_banner(f"some line before\n&&&& RUNNING TensorRT.trtexec [TensorRT {number}] # trtexec --help\n")
    assert found is not None
    assert (found.version, found.build) == (version, build)


def test_no_banner_is_no_version() -> None:
    assert parse_banner("trtexec: error while loading shared libraries: libnvinfer.so.8") is None


def test_a_published_log_of_8_2() -> None:
    log = parse_log(formats.LOG_8_2)
    assert log.passed is True
    assert log.throughput_qps == 424.281
    assert log.metrics_ms["GPU Compute Time"] == {
        "min": 2.33167, "max": 2.38287, "mean": 2.35166, "median": 2.35217, "p99": 2.37775,
    }  # fmt: skip
    assert log.metrics_ms["Latency"]["p99"] == 4.20166
    assert (log.warnings, log.errors, log.unstable_percent) == ((), (), None)


def test_a_published_log_with_warnings() -> None:
    log = parse_log(formats.LOG_8_6_UNSTABLE)
    assert log.unstable_percent == 29.0605
    assert len(log.warnings) == 2
    assert log.warnings[0].startswith("Throughput may be bound by Enqueue Time")
    assert log.metrics_ms["GPU Compute Time"]["p95"] == 0.0183105


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (formats.LOG_10_3_FAILED, "Cask convolution isConsistent check failed"),
        (formats.LOG_11_2_FAILED, "must have same input types"),
    ],
    ids=["10.3", "11.2"],
)
def test_a_failure_is_told_by_its_cause_not_by_what_every_failure_ends_with(text: str, reason: str) -> None:
    log = parse_log(text)
    assert log.passed is False
    assert reason in log.reason
    assert "Engine set up failed" not in log.reason


@pytest.mark.parametrize("version", formats.BANNERS)
@pytest.mark.parametrize("lines", range(1, 6))
def test_a_log_that_was_cut_short_has_no_verdict(version: str, lines: int) -> None:
    whole = formats.log(version, [1.0, 2.0, 3.0])
    cut = parse_log("\n".join(whole.splitlines()[:lines]))
    assert cut.passed is None
    assert cut.banner == parse_log(whole).banner
    assert cut.reason == "its log ends in the middle"


@given(st.lists(st.floats(0.01, 1e4), min_size=1, max_size=300))
@settings(max_examples=30, deadline=None)
def test_what_trtexec_prints_is_what_its_times_give_by_its_own_rule(values: list[float]) -> None:
    # the layout writes 6 digits of the summary and 9 of each time
    for version in formats.BANNERS:
        old = version.startswith("8")
        compute = parse_times(formats.times(values, old=old)).compute_ms
        printed = parse_log(formats.log(version, values)).metrics_ms["GPU Compute Time"]
        np.testing.assert_allclose(printed["mean"], compute.mean(), rtol=1e-5)
        np.testing.assert_allclose(printed["p99"], formats.percentile(compute, 99), rtol=1e-5)


def test_inferences_of_the_warm_up_are_left_out() -> None:
    text = formats.times([1.0] * 10 + [2.0] * 5, old=True)  # older versions list them
    found = parse_times(text, warmup_ms=9.999)
    assert found.compute_ms.tolist() == [2.0] * 5


def test_copies_count_in_the_latency_alone() -> None:
    found = parse_times(formats.times([1.5, 1.5], copies_ms=0.5))
    assert (found.compute_ms[0], found.latency_ms[0]) == (1.5, 2.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", r"expected the times of inferences; got no JSON at the times"),
        ('[ { "a" : 1 } ]', r"expected rows with startComputeMs, computeMs, latencyMs; got something else"),
        (formats.times([1.0]), r"expected inferences after 50 ms of warm-up; got none of 1"),
        ("[]", r"got none of 0 at the times; measure again"),
    ],
)
def test_times_that_are_none_are_refused(text: str, message: str) -> None:
    with pytest.raises(MeasureError, match=message):
        parse_times(text, warmup_ms=50)


def test_outputs_keep_numbers_that_are_none() -> None:
    text = '[ { "name" : "nan score", "dimensions" : "1x4", "values" : [ 1.5, -nan, inf, -inf ] } ]'
    values = parse_outputs(text)["nan score"]
    np.testing.assert_array_equal(values, [1.5, np.nan, np.inf, -np.inf])
    with pytest.raises(MeasureError, match=r"expected outputs with names and values; got something else"):
        parse_outputs('[ { "name" : "y" } ]')


def test_the_arguments_ask_for_the_same_on_each_version() -> None:
    old, new = trtexec_bench("m.plan", "10.3"), trtexec_bench("m.plan", "11.1")
    assert {"--useCudaGraph", "--noDataTransfers", "--useSpinWait"} <= set(old)
    assert not {"--useCudaGraph", "--noDataTransfers"} & set(new)  # its defaults
    assert "--includeDataTransfers" in trtexec_bench("m.plan", "11.1", copies=True)
    assert "--noDataTransfers" not in trtexec_bench("m.plan", "10.3", copies=True)
    assert "--duration=3" in trtexec_bench("m.plan", "8.5", seconds=3)
    assert "--streams=2" in trtexec_bench("m.plan", "8.5.2", streams=2)
    assert "--infStreams=2" in trtexec_bench("m.plan", "8.6", streams=2)
    assert not any("treams" in argument for argument in (*old, *new))
    assert "--fp16" in trtexec_build("m.onnx", "m.plan", "8.5", "int8", sparse=False)
    assert "--stronglyTyped" in trtexec_build("m.onnx", "m.plan", "10.3", "int8", sparse=False)


@pytest.mark.parametrize("text", ["10", "10.3; rm -rf /", "ten", "10.3 $(id)"])
def test_a_version_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ExportError, match=r"expected a TensorRT version such as 10.3"):
        tensorrt_version(text)


@pytest.mark.parametrize("name", ["a,b", "onnx::Input"])
def test_an_input_that_trtexec_cannot_name_is_refused(name: str) -> None:
    with pytest.raises(MeasureError, match=r"expected input names without ',' and ':'"):
        trtexec_outputs("m.plan", {name: "0.bin"}, "out.json")
