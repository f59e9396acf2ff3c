"""How much each layer and each modality minds being quantised, by errors that need no labels and few samples.

Three looks at a layer, each easier to misread alone than together: `local`, its own output computed from the same float
inputs in floating point and in INT8 side by side; `alone`, the network's outputs with this layer quantised and no
other; `spared`, the network's outputs with all layers quantised but this one. Errors are relative and squared: 0.01 is
a tenth of the output's standard deviation.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fusepress.calib.qdq import QdqGraph
from fusepress.calib.quantize import Draft, layer_macs
from fusepress.export.runtime import OnnxSession
from fusepress.pipeline.errors import TargetError
from fusepress.pipeline.graph.plan import FUSION
from fusepress.targets.network import read_network
from fusepress.targets.predict import predict_network
from fusepress.targets.profile import Profile

Array = np.ndarray[Any, Any]
Session = Callable[[Path], OnnxSession]
PROXY_SAMPLES = 8
OTHER_RUNS = 4  # of each sample: the float model, all INT8, and both sides of every layer
LEAST_COST = 1e-3  # of the most expensive unit: what costs nothing to spare is still not spared for nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitSensitivity:
    """One layer (or a node that no layer feeds).

    Attributes:
        name: of its node.
        branch: its modality, or "fusion".
        macs: multiply-accumulates of one inference.
        cost: what leaving it in floating point costs: predicted milliseconds, or MACs.
        local: relative squared error of its own output; None for what is no layer.
        alone: of the network's outputs when it alone is quantised.
        spared: of the network's outputs when it alone is not; None where there were too many layers for the budget.
    """

    name: str
    branch: str
    macs: int
    cost: float
    local: float | None
    alone: float
    spared: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class BranchSensitivity:
    """All units of one modality at once; as `UnitSensitivity`."""

    branch: str
    units: int
    macs: int
    alone: float
    spared: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """Of every unit and every branch of a draft.

    Attributes:
        units: in the graph's order.
        branches: in the order of appearance.
        everything: relative squared error of the outputs with all units quantised.
        cost_unit: "ms" or "MAC".
        samples: calibration samples that errors are measured on.
        runs: single inferences that it took.
    """

    units: tuple[UnitSensitivity, ...]
    branches: tuple[BranchSensitivity, ...]
    everything: float
    cost_unit: str
    samples: int
    runs: int

    def ranking(self) -> list[str]:
        """Units by the error that sparing them removes for what it costs, most first; ties in the graph's order."""
        return [unit.name for unit in sorted(self.units, key=lambda unit: -self.benefit(unit) / unit.cost)]

    def benefit(self, unit: UnitSensitivity) -> float:
        """The error that sparing a unit removes: alone on a float network, and from the quantised one."""
        removed = 0.0 if unit.spared is None else max(0.0, self.everything - unit.spared)
        return max(unit.alone, removed)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


def relative_error(got: Mapping[str, Array], expected: Mapping[str, Array]) -> float:
    """Squared error over the squared spread, mean over the outputs; integers are left out.

    Args:
        got: outputs of N samples.
        expected: what the float model says.
    """
    errors = []
    for name, value in expected.items():
        if not np.issubdtype(value.dtype, np.floating):
            continue
        wanted = value.astype(np.float64)
        noise = float(((got[name].astype(np.float64) - wanted) ** 2).sum())
        spread = float(((wanted - wanted.mean()) ** 2).sum()) or float((wanted**2).sum()) or 1.0
        errors.append(noise / spread)
    return float(np.mean(errors)) if errors else 0.0


class Tries:
    """Variants of one draft, run on the same few samples against the float model.

    Args:
        draft: with Q/DQ everywhere.
        arrays: input name -> N samples.
        samples: how many of them, taken evenly.
        session: opens a file as the target computes it.
    """

    def __init__(self, draft: Draft, arrays: Mapping[str, Array], samples: int, session: Session) -> None:
        self.draft, self.session = draft, session
        self.every = frozenset(draft.units())
        count = len(next(iter(arrays.values())))
        picked = np.linspace(0, count - 1, min(samples, count)).round().astype(int)
        self.feeds = {name: np.asarray(array)[picked] for name, array in arrays.items()}
        self.samples, self.runs = len(picked), 0
        self.expected = self._outputs(self.every)

    def error(self, spared: Collection[str], draft: Draft | None = None) -> float:
        """Relative error of the outputs with these units left in floating point, of this draft or another."""
        return relative_error(self._outputs(spared, draft), self.expected)

    def _outputs(self, spared: Collection[str], draft: Draft | None = None) -> dict[str, Array]:
        self.runs += self.samples
        with tempfile.TemporaryDirectory(prefix="fusepress-") as folder:
            session = self.session((draft or self.draft).write(Path(folder) / "variant.onnx", spared))
            return session.run_numpy(self.feeds)


def measure_sensitivity(
    draft: Draft,
    arrays: Mapping[str, Array],
    *,
    branch_of: Callable[[str], str],
    costs: Mapping[str, float],
    cost_unit: str,
    session: Session,
    most_runs: int,
    progress: Callable[[float], None] | None = None,
) -> Sensitivity:
    """Measure every unit and every branch.

    Args:
        draft: with Q/DQ everywhere.
        arrays: input name -> N calibration samples.
        branch_of: the modality of a node.
        costs: unit -> what leaving it in floating point costs; those without one cost the least.
        cost_unit: what that is in.
        session: opens a file as the target computes it.
        most_runs: inferences to stay below where the number of units allows it, on at most `PROXY_SAMPLES` samples.
        progress: called with the fraction done.
    """
    units = list(draft.units())
    members: dict[str, list[str]] = {}
    for unit in units:
        members.setdefault(branch_of(unit), []).append(unit)
    variants = len(units) + len(members)
    both_ways = 2 * variants + OTHER_RUNS <= most_runs
    planned = (2 if both_ways else 1) * variants + OTHER_RUNS
    tries = Tries(draft, arrays, max(1, min(PROXY_SAMPLES, most_runs // planned)), session)
    local = local_errors(draft, tries.feeds)
    tries.runs += 2 * tries.samples  # every layer ran twice
    done = 0

    def both(group: Sequence[str]) -> tuple[float, float | None]:
        nonlocal done
        alone = tries.error(tries.every - set(group))
        spared = tries.error(group) if both_ways else None
        done += 1
        if progress is not None:
            progress(done / variants)
        return alone, spared

    macs = layer_macs(draft.float_proto)
    least = LEAST_COST * max(costs.values(), default=1.0) or 1.0
    rows, branches = [], []
    for unit in units:
        alone, spared = both([unit])
        rows.append(
            UnitSensitivity(
                name=unit,
                branch=branch_of(unit),
                macs=macs.get(unit, 0),
                cost=max(costs.get(unit, 0.0), least),
                local=local.get(unit),
                alone=alone,
                spared=spared,
            )
        )
    for branch, group in members.items():
        alone, spared = both(group)
        total = sum(macs.get(unit, 0) for unit in group)
        branches.append(BranchSensitivity(branch=branch, units=len(group), macs=total, alone=alone, spared=spared))
    return Sensitivity(
        units=tuple(rows),
        branches=tuple(branches),
        everything=tries.error(()),
        cost_unit=cost_unit,
        samples=tries.samples,
        runs=tries.runs,
    )


def local_errors(draft: Draft, feeds: Mapping[str, Array]) -> dict[str, float]:
    """Relative squared error of every layer's own output: float and INT8 side by side on the same float inputs.

    Args:
        draft: with Q/DQ everywhere.
        feeds: input name -> N samples.
    """
    proto, layers = _side_by_side(draft)
    with tempfile.TemporaryDirectory(prefix="fusepress-") as folder:
        path = Path(folder) / "side_by_side.onnx"
        path.write_bytes(proto.SerializeToString())
        sums = OnnxSession(path).run_numpy(feeds)
    return {
        name: float(sums[f"{name}::noise"].sum()) / (float(sums[f"{name}::signal"].sum()) or 1.0) for name in layers
    }


def _side_by_side(draft: Draft) -> tuple[Any, list[str]]:
    """A float graph in which every quantised layer has a quantised twin, and the sums of squares of both as outputs."""
    from onnx import TensorProto, helper

    proto = draft.variant()
    graph = QdqGraph(proto)
    layers = graph.layers()
    twins, outputs = [], []
    for node in list(proto.graph.node):
        if node.name in layers:
            twin = type(node)()
            twin.CopyFrom(node)
            twin.name, twin.output[0] = f"{node.name}::int8", f"{node.name}::int8"
            wrong, noise, signal = (f"{node.name}::{what}" for what in ("wrong", "noise", "signal"))
            twins += [
                twin,
                helper.make_node("Sub", [twin.output[0], node.output[0]], [wrong]),
                helper.make_node("ReduceSumSquare", [wrong], [noise], keepdims=1),
                helper.make_node("ReduceSumSquare", [node.output[0]], [signal], keepdims=1),
            ]
            outputs += [noise, signal]
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            for index, tensor in enumerate(node.input):
                source = graph.source(tensor)
                if source is not None:
                    node.input[index] = source
    proto.graph.node.extend(twins)
    del proto.graph.output[:]
    proto.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs)
    return proto, layers


def spare_costs(
    draft: Draft, profile: Profile, remainder: str, *, mode: str | None = None
) -> tuple[dict[str, float], str]:
    """What leaving each layer in floating point costs on a target: predicted milliseconds, or else MACs.

    Args:
        draft: the draft.
        profile: the target.
        remainder: precision that a spared layer computes in.
        mode: the power mode.

    Returns:
        Layer -> cost, and its unit; MACs where nothing predicts both precisions for the target. For a CPU nothing does:
        none is in the fit, and what its clock says changes from run to run.
    """
    in_macs = {name: float(macs) for name, macs in layer_macs(draft.float_proto).items()}, "MAC"
    if profile.family == "host":
        return in_macs
    network = read_network(draft.float_proto.SerializeToString())
    try:
        low = predict_network(network, profile, draft.precision, mode=mode)
        high = predict_network(network, profile, remainder, mode=mode)
    except TargetError:
        return in_macs
    fast = {layer.name: layer.ms for layer in low.layers}
    return {layer.name: max(0.0, layer.ms - fast[layer.name]) for layer in high.layers}, "ms"


def branch_by_modules(branches: Mapping[str, Sequence[str]]) -> Callable[[str], str]:
    """The modality of a node from the module paths of the task's branches; all else is fusion."""

    def branch_of(node: str) -> str:
        module = node.rpartition("/")[0]
        found = [name for name, paths in branches.items() if _below(module, paths)]
        return found[0] if len(found) == 1 else FUSION

    return branch_of


def _below(module: str, paths: Iterable[str]) -> bool:
    return any(module == path or module.startswith(f"{path}.") for path in paths)
