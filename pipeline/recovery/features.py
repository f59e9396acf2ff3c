"""The dense model's features at named points, as a teacher of a student that kept some of their channels.

A point is a module's path; by default what the branches return, and the fuser. The student's features F_s are compared
with the channels of the teacher's that the student kept: || Norm(F_s) - Norm(F_t[kept]) ||^2 as a mean over elements,
where Norm gives the features of one sample mean 0 and variance 1 over channels and positions. So the loss knows no
scale, does not depend on the batch size, and is exactly 0 where the student's features are the kept ones.

Which channels of a point's output were kept follows from the prune plan alone. On a copy whose dense layers return
fixed noise (graph/dependence.py), all removed channels are disturbed where they are made: the indices of the output
that answer are those of removed channels, however the model stacks, repeats or transposes them on the way. Then it is
tested: of the dense model gated by the plan, the indexed features must equal those of the pruned model.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fusepress.pipeline.errors import TaskError, TraceError
from fusepress.pipeline.graph.apply import apply_plan, gate_model
from fusepress.pipeline.graph.check import relative_gap
from fusepress.pipeline.graph.dependence import Forward, set_up, start
from fusepress.pipeline.graph.groups import working_copy
from fusepress.pipeline.graph.plan import PrunePlan
from fusepress.pipeline.graph.ports import inside

PROBE_SECONDS = 120
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """The part of a dense feature that a student has: `index` along `dim`."""

    dim: int
    index: tuple[int, ...]

    def of(self, dense: Tensor) -> Tensor:
        """That part."""
        return dense.index_select(self.dim, torch.tensor(self.index, device=dense.device))


def feature_loss(student: Tensor, teacher: Tensor, kept: Kept | None = None) -> Tensor:
    """Mean squared difference of two features, each with mean 0 and variance 1 over every sample.

    Args:
        student: `[B, ...]`.
        teacher: the dense model's, `[B, ...]`; it gets no gradient.
        kept: what of it the student has; None is all of it.

    Returns:
        A scalar from 0 (equal up to scale and shift) to 4 (opposite), in float32 or wider.
    """
    wanted = teacher.detach() if kept is None else kept.of(teacher.detach())
    return (_normed(student) - _normed(wanted)).square().mean()


def _normed(x: Tensor) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    return F.layer_norm(wide, wide.shape[1:])


class FeatureTap:
    """Keeps what modules return in the latest forward pass of a model, until it is closed."""

    def __init__(self, model: nn.Module, points: Sequence[str], *, graph_only: bool = False) -> None:
        """Watch the modules at `points`; with `graph_only` only in passes that build a graph."""
        self._graph_only = graph_only
        self._found: dict[str, list[Tensor]] = {}
        self._hooks: list[RemovableHandle] = [model.register_forward_pre_hook(lambda _m, _i: self._found.clear())]
        modules = dict(model.named_modules())
        for point in points:
            self._hooks.append(modules[point].register_forward_hook(lambda _m, _i, out, p=point: self._keep(p, out)))

    def _keep(self, point: str, output: Any) -> None:
        if torch.is_grad_enabled() or not self._graph_only:
            self._found.setdefault(point, []).extend(tensors_in(output))

    def take(self) -> dict[str, Tensor]:
        """Features by point; "point[k]" where it returned several tensors or was called several times."""
        found = {
            point if len(values) == 1 else f"{point}[{k}]": value
            for point, values in self._found.items()
            for k, value in enumerate(values)
        }
        self._found.clear()
        return found

    def close(self) -> None:
        """Remove the hooks and what is kept."""
        for hook in self._hooks:
            hook.remove()
        self._found.clear()


def tensors_in(value: Any) -> list[Tensor]:
    """The floating-point tensors of a module's output, in order."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return [tensor for item in items for tensor in tensors_in(item)]


@dataclass(slots=True, kw_only=True)
class FeatureTeacher:
    """Student and dense model with a tap on each, and what of each dense feature the student has.

    Attributes:
        student: its tap.
        teacher: the dense model's.
        kept: by feature; None is all of it.
    """

    student: FeatureTap
    teacher: FeatureTap
    kept: dict[str, Kept | None] = field(default_factory=dict)

    def losses(self) -> dict[str, Tensor]:
        """Loss of each feature, from the latest forward pass of both.

        Raises:
            TaskError: a feature of the student is missing: its forward pass was not the one before.
        """
        mine, theirs = self.student.take(), self.teacher.take()
        missing = [name for name in self.kept if name not in mine or name not in theirs]
        if missing:
            raise TaskError(
                f"expected the features {list(self.kept)} of a forward pass of both models; got none of "
                f"{missing[0]!r}; call the student with gradients just before the loss, or leave it out of "
                "finetune.distill_points"
            )
        return {name: feature_loss(mine[name], theirs[name], kept) for name, kept in self.kept.items()}

    def tensors(self) -> dict[str, Tensor]:
        """What is compared, as tensors to be hashed."""
        return {
            f"kept:{name}": torch.tensor([] if kept is None else [kept.dim, *kept.index])
            for name, kept in self.kept.items()
        }

    def close(self) -> None:
        """Take both taps off."""
        self.student.close()
        self.teacher.close()


def teach_features(
    student: nn.Module,
    teacher: nn.Module,
    plan: PrunePlan | None,
    inputs: Mapping[str, Tensor],
    branches: Mapping[str, Sequence[str]],
    points: Sequence[str] = (),
) -> FeatureTeacher:
    """Tap both models at the points whose kept channels can be told.

    Args:
        student: the dense model pruned by `plan`, with any weights.
        teacher: the dense model.
        plan: None where nothing was pruned.
        inputs: of a batch, by name, on the models' device.
        branches: modality -> module paths.
        points: module paths; default: the branches' and the fuser.

    Raises:
        TaskError: a named point does not exist or its channels cannot be told, or no default point's can.
    """
    wanted = list(points) or default_points(teacher, inputs, branches)
    known = {name for name, _ in teacher.named_modules() if name}
    for point in wanted:
        if point not in known:
            raise TaskError(
                f"expected finetune.distill_points to name modules of the model; got {point!r}; its top modules are "
                f"{[name for name, _ in teacher.named_children()]}"
            )
    kept, refused = kept_channels(teacher, plan, dict(inputs), wanted)
    for point, why in refused.items():
        if points:
            raise TaskError(
                f"expected finetune.distill_points to name modules whose kept channels can be told; got {point!r}: "
                f"{why}; name one before or behind it"
            )
        logger.warning("the features of %s are not taught: %s", point, why)
    if not kept:
        raise TaskError(
            f"expected features to teach at {wanted or 'the branches and the fuser'}; got none whose kept channels can "
            "be told; name other modules in finetune.distill_points, or set finetune.distill_features to 0"
        )
    taught = [point for point in wanted if point not in refused]
    shares = [name if part is None else f"{name} ({len(part.index)} channels)" for name, part in kept.items()]
    logger.info("the dense model teaches its features at %s", ", ".join(shares))
    return FeatureTeacher(
        student=FeatureTap(student, taught, graph_only=True), teacher=FeatureTap(teacher, taught), kept=kept
    )


def kept_channels(
    dense: nn.Module, plan: PrunePlan | None, inputs: dict[str, Tensor], points: Sequence[str]
) -> tuple[dict[str, Kept | None], dict[str, str]]:
    """What of each feature of the dense model is left under a plan.

    Args:
        dense: the model that the plan was made for; it is not changed.
        plan: None where nothing was pruned.
        inputs: batch first; two samples of them are used.
        points: module paths.

    Returns:
        By feature what is kept (None: all of it), and by point why that cannot be told.

    Raises:
        TraceError: the model cannot be copied or run.
        CheckpointError: the plan belongs to another architecture.
    """
    with working_copy(dense, inputs) as (model, few, forward, tolerance):
        pruned = copy.deepcopy(model) if plan is None else apply_plan(copy.deepcopy(model), plan)
        gated = model if plan is None else gate_model(model, plan)
        wanted, got = (_features(each, few, forward, points) for each in (gated, pruned))
        answers = {} if plan is None else _answers(model, plan, few, forward, points)
        kept: dict[str, Kept | None] = {}
        refused: dict[str, str] = {}
        for point in points:
            names = [name for name in wanted if name == point or name.startswith(f"{point}[")]
            try:
                if not names:
                    raise TraceError("the forward pass does not call it, or it returns no tensor")
                for name in names:
                    kept[name] = _told(wanted[name], got.get(name), answers.get(name), tolerance)
            except TraceError as error:
                refused[point] = str(error)
                kept = {name: part for name, part in kept.items() if name not in names}
    return kept, refused


def _features(
    model: nn.Module, inputs: dict[str, Tensor], forward: Forward, points: Sequence[str]
) -> dict[str, Tensor]:
    tap = FeatureTap(model, points)
    try:
        forward(model, inputs)
        return {name: value.clone() for name, value in tap.take().items()}
    finally:
        tap.close()


def _answers(
    model: nn.Module, plan: PrunePlan, inputs: dict[str, Tensor], forward: Forward, points: Sequence[str]
) -> dict[str, Tensor]:
    """Which elements of each feature change when the removed channels are disturbed where they are made.

    Empty where the model does not run on noise.
    """
    bench = set_up(copy.deepcopy(model), inputs, forward, time.monotonic() + PROBE_SECONDS)
    bench.watched = set()  # only the points are looked at
    try:
        start(bench)
        tap = FeatureTap(bench.model, points)
        bench.run()
        before = {name: value.clone() for name, value in tap.take().items()}
        bench.masks = _removed(bench.ports, plan)
        bench.run()
        after = tap.take()
    except Exception as error:  # noqa: BLE001 - the user's forward may raise anything on unusual values
        logger.info("the dense model does not run on noise: %s: %s", type(error).__name__, error)
        return {}
    return {name: before[name] != value for name, value in after.items() if value.shape == before[name].shape}


def _removed(ports: Mapping[str, Any], plan: PrunePlan) -> dict[str, Tensor]:
    """Masks of the removed channels, by the port that makes them."""
    masks: dict[str, Tensor] = {}
    for group in plan.groups:
        for member in group.members:
            port = f"out:{member.param.rpartition('.')[0]}"
            if member.role == "producer" and member.param.endswith(".weight") and port in ports:
                mask = masks.setdefault(port, torch.zeros(ports[port].size, dtype=torch.bool))
                mask[member.indices(group.removed)] = True
    return masks


def _told(dense: Tensor, pruned: Tensor | None, answer: Tensor | None, tolerance: float) -> Kept | None:
    """What of a dense feature is left in the pruned one.

    Raises:
        TraceError: that cannot be told, and why.
    """
    if pruned is None or pruned.dim() != dense.dim() or dense.dim() < 2:
        raise TraceError("it returns something of another form in the pruned model")
    dims = [d for d, (a, b) in enumerate(zip(dense.shape, pruned.shape, strict=True)) if a != b]
    if len(dims) > 1 or dims == [0]:
        raise TraceError(f"its shape {tuple(dense.shape)} becomes {tuple(pruned.shape)}, in no one channel dimension")
    kept = None
    if dims:
        if answer is None:
            raise TraceError("the dense model does not run on noise, which tells its channels apart")
        gone = answer.any(dim=[d for d in range(dense.dim()) if d != dims[0]])
        index = tuple((~gone).nonzero().flatten().tolist())
        if len(index) != pruned.shape[dims[0]]:
            raise TraceError(
                f"{len(index)} of its {dense.shape[dims[0]]} channels are free of removed ones, but the pruned model "
                f"has {pruned.shape[dims[0]]}"
            )
        kept = Kept(dim=dims[0], index=index)
    gap = relative_gap(pruned, dense if kept is None else kept.of(dense))
    if gap > tolerance:
        raise TraceError(f"its kept channels are not those of the pruned model (relative {gap:.1e})")
    return kept


def default_points(model: nn.Module, inputs: Mapping[str, Tensor], branches: Mapping[str, Sequence[str]]) -> list[str]:
    """What the branches return, and the fuser, if there is one.

    A branch whose module is not called itself (its parts are, between the fusions) returns what the last of its
    outermost called modules does.
    """
    calls, _ = _calls(model, inputs)
    order = {name: k for k, (name, _) in enumerate(calls)}
    points = []
    for path in (path for paths in branches.values() for path in paths):
        parts = [path] if path in order else _outermost(model.get_submodule(path), path, [], set(order))
        points.append(max(parts, key=lambda name: order[name], default=path))
    fuser = find_fuser(model, inputs, branches)
    return [*points, *([fuser] if fuser is not None else [])]


def find_fuser(model: nn.Module, inputs: Mapping[str, Tensor], branches: Mapping[str, Sequence[str]]) -> str | None:
    """The first module outside the branches that has parameters and runs after all of them, but for output layers.

    Args:
        model: it is run once, in evaluation mode.
        inputs: of a batch, by name.
        branches: modality -> module paths.

    Returns:
        The path of the outermost such module, or None.
    """
    paths = [path for listed in branches.values() for path in listed]
    calls, outputs = _calls(model, inputs)
    last = max((k for k, (name, _) in enumerate(calls) if any(inside(name, path) for path in paths)), default=-1)
    whole = set(_outermost(model, "", paths, {name for name, _ in calls}))
    made = {id(tensor) for tensor in outputs}
    for name, found in calls[last + 1 :]:
        weighs = name in whole and any(True for _ in model.get_submodule(name).parameters())
        if weighs and not any(id(tensor) in made for tensor in found):
            return name
    return None


def _calls(model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[list[tuple[str, list[Tensor]]], list[Tensor]]:
    """Modules in the order in which their forward pass ends, with what they return; and what the model returns."""
    ends: list[tuple[str, list[Tensor]]] = []
    hooks = [
        module.register_forward_hook(lambda _m, _i, out, name=name: ends.append((name, tensors_in(out))))
        for name, module in model.named_modules()
    ]
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            return ends, tensors_in(model.eval()(**inputs))
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training


def _outermost(module: nn.Module, name: str, paths: Sequence[str], called: set[str]) -> list[str]:
    """Called modules that neither lie at one of the paths nor hold one, and lie in no other such module."""
    if any(inside(name, path) for path in paths):
        return []
    if name and name in called and not any(inside(path, name) for path in paths):
        return [name]
    prefix = f"{name}." if name else ""
    return [n for key, child in module.named_children() for n in _outermost(child, f"{prefix}{key}", paths, called)]
