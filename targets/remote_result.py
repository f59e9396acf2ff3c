"""What a measurement on a device is asked for, what it finds, and how its rounds become numbers."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fusepress.pipeline.errors import MeasureError
from fusepress.targets.doctor import DeviceFacts, Finding, PowerState, Samples
from fusepress.targets.latency import LatencyMeasurement, Speedup, speedup_of, summarize
from fusepress.targets.trtexec import Times, TrtexecLog

KEPT_A_ROUND = 3000  # times; more say nothing new and cost the bootstrap memory

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOrder:
    """An engine to build and time.

    Attributes:
        name: what it is called here; the device never sees it.
        precision: fp32, fp16, int8 or fp8, which TensorRT before 10 takes as a permission.
        sparse: sparse kernels are allowed.
    """

    name: str
    onnx: Path
    precision: str
    sparse: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteSettings:
    """How to measure.

    Attributes:
        seconds: of timing, for each engine, over all rounds.
        rounds: engines are timed in turns, this many times each.
        lock_clocks: with jetson_clocks, where sudo allows it; put back afterwards.
        set_mode: change to the power mode that is judged; put back afterwards.
        build_limit_s: longest time for one engine.
        wait_s: for another user to leave the device.
        streams: inferences at the same time, for the throughput of the first engine; 1 to leave it out.
    """

    seconds: float = 10.0
    rounds: int = 3
    lock_clocks: bool = True
    set_mode: bool = False
    build_limit_s: int = 3600
    wait_s: float = 0.0
    streams: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Throughput:
    """Inferences on several streams at once.

    Attributes:
        streams: how many.
        per_second: of all streams together, as trtexec counts.
        latency: of one of them, while the others run.
    """

    streams: int
    per_second: float
    latency: LatencyMeasurement


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineResult:
    """One engine on the device.

    Attributes:
        reused: it was there already.
        latency: of the computation alone, all rounds after one another.
        with_copies: of the computation with its copies between host and device; None where it was not timed.
        warnings: trtexec's, about the timing.
        unstable: why the timing cannot be trusted; empty where it can.
        energy_mj: of the whole board for one inference, where its rails tell; without load and warm-up.
        throughput: on several streams; None where it was not asked for.
        layers, profile: what trtexec exports about the layers, as it is.
    """

    name: str
    onnx_sha256: str
    key: str
    reused: bool
    latency: LatencyMeasurement
    with_copies: LatencyMeasurement | None = None
    warnings: tuple[str, ...] = ()
    unstable: tuple[str, ...] = ()
    energy_mj: float | None = None
    throughput: Throughput | None = None
    layers: str = ""
    profile: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How far an output of the device is from its reference: the largest, as a part of the reference's scale."""

    reference: int
    output: str
    relative: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteResult:
    """What a measurement on a device found.

    Attributes:
        engines: in the order that was asked for.
        differences: of the first engine's outputs from the references.
        during: power state while timing.
        clocks_locked: jetson_clocks held them.
        restored: the power state is what it was.
        drops: how often the connection was made again.
    """

    facts: DeviceFacts
    findings: tuple[Finding, ...]
    engines: Mapping[str, EngineResult]
    differences: tuple[Difference, ...]
    during: PowerState
    clocks_locked: bool
    restored: bool
    drops: int
    speedups: Mapping[str, Speedup] = field(default_factory=dict)

    @property
    def tensorrt(self) -> str:
        """Version that built and ran the engines."""
        assert self.facts.tensorrt is not None
        return self.facts.tensorrt.version

    def to_dict(self) -> dict[str, Any]:
        """What the numbers depend on, as plain JSON values."""
        return {
            "device": self.facts.to_dict(),
            "findings": [f"{finding.level}: {finding.what}: {finding.text}" for finding in self.findings],
            "during": self.during.to_dict(),
            "clocks_locked": self.clocks_locked,
            "power_restored": self.restored,
            "connection_drops": self.drops,
            "engines": {
                name: {"key": e.key, "reused": e.reused, "warnings": list(e.warnings), "unstable": list(e.unstable)}
                for name, e in self.engines.items()
            },
            "differences": [[d.reference, d.output, d.relative] for d in self.differences],
        }


@dataclass(slots=True)
class Timing:
    """Rounds of one engine."""

    times: list[Times] = field(default_factory=list)
    logs: list[TrtexecLog] = field(default_factory=list)
    samples: list[Samples] = field(default_factory=list)

    def compute_ms(self) -> Array:
        """All rounds after one another."""
        return np.concatenate([times.compute_ms[:KEPT_A_ROUND] for times in self.times])

    def latency(self) -> LatencyMeasurement:
        """Of the computation alone."""
        environment = {"rounds": len(self.times), "samples": [samples.to_dict() for samples in self.samples]}
        return summarize(self.compute_ms(), environment=environment)

    def warnings(self) -> tuple[str, ...]:
        """Trtexec's own, each once."""
        return tuple(dict.fromkeys(warning for log in self.logs for warning in log.warnings))

    def unstable(self) -> tuple[str, ...]:
        """Why these times cannot be trusted."""
        latency, why = self.latency(), []
        if not latency.stable:
            why.append(latency.why_unstable)
        for samples in self.samples:
            if samples.clock_dropped:
                assert samples.gpu_mhz is not None
                low, high = samples.gpu_mhz
                why.append(f"the busy GPU's clock moved between {low:g} and {high:g} MHz")
        return tuple(dict.fromkeys(why))

    def energy_mj(self) -> float | None:
        """Mean power of the board while inferences are timed, times the time that one takes, back to back."""
        powers = [s.board_mw for s in self.samples if s.board_mw is not None]
        rates = [log.throughput_qps for log in self.logs if log.throughput_qps]
        if not powers or not rates:
            return None
        return float(np.mean(powers) / np.mean(rates))


def speedups(orders: Sequence[EngineOrder], timed: Mapping[str, Timing]) -> dict[str, Speedup]:
    """How much faster the first engine is than each other one, from rounds that were timed in turns."""
    first = timed[orders[0].name]
    found = {}
    for order in orders[1:]:
        pairs = [
            (new.compute_ms[:n], old.compute_ms[:n])
            for new, old in zip(first.times, timed[order.name].times, strict=True)
            for n in [min(len(new.compute_ms), len(old.compute_ms), KEPT_A_ROUND)]
        ]
        new, old = (np.concatenate(column) for column in zip(*pairs, strict=True))
        found[order.name] = speedup_of(old, new)
    return found


def longest_pause_s(states: Sequence[PowerState]) -> float:
    """Between the end of a run and the start of the next, by the device's clock, which may have been set meanwhile.

    Args:
        states: before and after each run, in their order.
    """
    clocks = [(before.clock_s, after.clock_s) for before, after in zip(states[::2], states[1::2], strict=True)]
    pauses = [
        abs(start - end) for (_, end), (start, _) in itertools.pairwise(clocks) if start is not None and end is not None
    ]
    return float(max(pauses, default=0.0))


def compare_outputs(
    reference: int, got: Mapping[str, Array], outputs: Sequence[Mapping[str, Any]], folder: Path
) -> list[Difference]:
    """How far outputs of a device are from references.

    Raises:
        MeasureError: an output is missing or has another size.
    """
    found = []
    for output in outputs:
        name = str(output["name"])
        want = np.fromfile(folder / output["file"], dtype=output["type"]).astype(np.float64)
        values = got.get(name)
        if values is None or values.size != want.size:
            size = "none" if values is None else str(values.size)
            raise MeasureError(
                f"expected {want.size} values of the output {name!r}; got {size} from the device; was the model "
                "changed after its references were made?"
            )
        scale = float(np.abs(want).max(initial=0.0)) or 1.0
        far = float(np.abs(values - want).max(initial=0.0)) / scale if np.all(np.isfinite(values)) else float("inf")
        found.append(Difference(reference=reference, output=name, relative=far))
    return found
