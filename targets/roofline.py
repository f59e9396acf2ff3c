"""The fitted constants of the latency prediction, how they came about, and how far they hold.

They are read from `profiles/latency.json`, which `benchmarks/latency` fits on published TensorRT latencies at batch 1
and writes together with the errors on model families and devices that were held out (`benchmarks/results/latency`). A
profile with a `latency` section, which `fusepress targets fit` writes from measurements of your own, has its own.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from fusepress.pipeline.errors import TargetError
from fusepress.targets.kernels import Constants
from fusepress.targets.profile import PROFILE_FOLDER, Profile

FITTED = PROFILE_FOLDER / "latency.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConstantSet:
    """Constants, what they were fitted on, and how wide the truth scatters about a prediction.

    Attributes:
        stream_ms: what a kernel costs more when the host starts it, instead of a CUDA graph.
        devices: profiles with rows in the fit, and the power modes of these.
        gmacs: smallest and largest network, in 10^9 multiply-accumulates, by compute capability.
        precisions: what the rows of a compute capability were built in.
        ops: operators that start a kernel in the fitted networks.
        shares: largest share of the time that a fitted network spends in a kind of kernel.
        calibrated: devices with rows of several families, so that one was held out while the device stayed in the fit.
        known: 90 % of held-out truths lie within this factor of a prediction, either way, for these devices.
        sibling: the same for all others.
    """

    constants: Constants
    stream_ms: float
    devices: Mapping[str, frozenset[str]]
    gmacs: Mapping[str, tuple[float, float]]
    precisions: Mapping[str, frozenset[str]]
    ops: frozenset[str]
    shares: Mapping[str, float]
    calibrated: frozenset[str]
    known: float
    sibling: float

    def factor(self, device: str) -> float:
        """Half the interval of a device, as a factor."""
        return self.known if device in self.calibrated else self.sibling


def set_of(raw: Mapping[str, Any]) -> ConstantSet:
    """A set as it is stored."""
    return ConstantSet(
        constants=Constants(**raw["constants"]),
        stream_ms=raw["stream_ms"],
        devices={name: frozenset(modes) for name, modes in raw["devices"].items()},
        gmacs={key: (low, high) for key, (low, high) in raw["gmacs"].items()},
        precisions={key: frozenset(value) for key, value in raw["precisions"].items()},
        ops=frozenset(raw["ops"]),
        shares=raw["shares"],
        calibrated=frozenset(raw["devices"] if raw.get("calibrated") is None else raw["calibrated"]),
        known=raw["known"],
        sibling=raw["sibling"],
    )


# A CPU has no validated rows at all: priors, and an interval that says so.
HOST = ConstantSet(
    constants=Constants(
        compute_fp32=0.5,
        compute_fp16=0.5,
        compute_int8=0.4,
        compute_scalar=0.2,
        memory=0.5,
        cache_share=0.7,
        launch_cycles=15000,
        tile_cycles=0,
        smooth_cycles=0,
        step_cycles=0,
        overlap=1.5,
    ),
    stream_ms=0.0,
    devices={},
    gmacs={},
    precisions={},
    ops=frozenset(),
    shares={},
    calibrated=frozenset(),
    known=4.0,
    sibling=4.0,
)


@functools.cache
def fitted_sets() -> dict[str, ConstantSet]:
    """The committed sets, by name."""
    return {name: set_of(raw) for name, raw in json.loads(FITTED.read_text(encoding="utf-8"))["sets"].items()}


def constants_for(compute_capability: str | None) -> ConstantSet:
    """The committed set for a compute capability; None is a CPU."""
    if compute_capability is None:
        return HOST
    return fitted_sets()["orin" if compute_capability == "8.7" else "general"]


def constants_of(profile: Profile) -> ConstantSet:
    """The set for a target: that of its profile where measurements were fitted, else that of its architecture.

    Raises:
        TargetError: the profile's constants are those of another version.
    """
    if profile.latency is not None:
        expected, got = {f.name for f in fields(Constants)}, set(profile.latency.constants)
        if expected != got:
            raise TargetError(
                f"expected the constants {sorted(expected)}; got {sorted(got)} at latency.constants of {profile.name}; "
                "write the profile again with `fusepress targets fit`"
            )
        return set_of(profile.latency.model_dump())
    return constants_for(profile.compute_capability)
