"""A pipeline's latency from its parts: sums, longest ways, and which part is worth compressing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusepress.pipeline.errors import TaskError
from fusepress.targets.critical_path import PipelineLatency, Span, pipeline_latency


def span(value: float, width: float = 0.1) -> Span:
    return Span(value_ms=value, low_ms=value * (1 - width), high_ms=value * (1 + width))


def gains(found: PipelineLatency) -> dict[str, float]:
    return {part.name: part.gain_ms for part in found.parts}


def test_one_after_the_other_every_millisecond_counts() -> None:
    found = pipeline_latency(
        {"camera": span(6.0), "lidar": span(4.0)}, span(2.0), {"lidar.voxelise": 1.5, "decode": 0.5}
    )
    assert found.whole.value_ms == pytest.approx(14.0)
    assert found.whole.low_ms == pytest.approx(0.9 * 12 + 2.0)  # declared stages have no width
    assert found.whole.high_ms == pytest.approx(1.1 * 12 + 2.0)
    assert gains(found) == pytest.approx(
        {"camera": 6.0, "lidar": 4.0, "rest": 2.0, "lidar.voxelise": 1.5, "decode": 0.5}
    )
    assert [part.name for part in found.parts][:2] == ["camera", "lidar"]
    assert all(part.critical for part in found.parts)


def test_at_the_same_time_only_the_longest_way_counts() -> None:
    found = pipeline_latency(
        {"camera": span(6.0), "lidar": span(4.0)},
        span(2.0),
        {"lidar.voxelise": 1.5, "decode": 0.5},
        schedule="parallel",
    )
    assert found.whole.value_ms == pytest.approx(8.5)  # 6, not 5.5, then 2 and 0.5
    # without the camera the lidar's 5.5 ms remain: half a millisecond is won
    assert gains(found) == pytest.approx(
        {"rest": 2.0, "camera": 0.5, "decode": 0.5, "lidar": 0.0, "lidar.voxelise": 0.0}
    )
    slack = {part.name: part.slack_ms for part in found.parts}
    assert slack == pytest.approx({"rest": 0.0, "camera": 0.0, "decode": 0.0, "lidar": 0.5, "lidar.voxelise": 0.5})
    assert {part.name for part in found.parts if part.critical} == {"rest", "camera", "decode"}


times = st.floats(0, 100)


@given(st.lists(times, min_size=1, max_size=5), times, st.lists(times, max_size=3))
def test_running_at_the_same_time_is_never_slower_and_nothing_wins_more_than_it_takes(
    branches: list[float], rest: float, stages: list[float]
) -> None:
    named = {f"b{index}": span(value) for index, value in enumerate(branches)}
    outside = {f"b{index % len(branches)}.s{index}": value for index, value in enumerate(stages)}
    serial = pipeline_latency(named, span(rest), outside)
    parallel = pipeline_latency(named, span(rest), outside, schedule="parallel")
    assert parallel.whole.value_ms <= serial.whole.value_ms * (1 + 1e-9)
    assert serial.whole.value_ms == pytest.approx(sum(branches) + rest + sum(stages))
    for found in (serial, parallel):
        assert found.whole.low_ms <= found.whole.value_ms * (1 + 1e-9)
        assert found.whole.value_ms <= found.whole.high_ms * (1 + 1e-9)
        for part in found.parts:
            assert -1e-9 <= part.gain_ms <= part.span.value_ms + 1e-9
            if not part.critical:
                assert part.gain_ms == pytest.approx(0.0, abs=1e-9)


def test_stages_of_no_branch_and_negative_ones_are_refused() -> None:
    branches = {"camera": span(1.0)}
    with pytest.raises(TaskError, match=r"expected an outside stage of a branch, one of camera; got 'radar.cluster'"):
        pipeline_latency(branches, span(1.0), {"radar.cluster": 1.0})
    with pytest.raises(TaskError, match=r"expected a latency of at least 0 ms; got -1.0 at outside stage 'decode'"):
        pipeline_latency(branches, span(1.0), {"decode": -1.0})
    with pytest.raises(TaskError, match=r"expected a latency of at least 0 ms; got nan at outside stage 'decode'"):
        pipeline_latency(branches, span(1.0), {"decode": float("nan")})
    for name in ("camera", "rest"):
        with pytest.raises(TaskError, match=rf"expected an outside stage with a name of its own; got '{name}'"):
            pipeline_latency(branches, span(1.0), {name: 1.0})
    with pytest.raises(TaskError, match=r"expected branches of other names than 'rest'"):
        pipeline_latency({"rest": span(1.0)}, span(1.0))
