"""SynFlow (Tanaka et al., NeurIPS 2020): how much of the flow of ones through |weights| passes a unit. No data.

R is the sum of all outputs of the network with every weight replaced by its absolute value, for an input of ones; a
score is |theta| * dR/d|theta| / R, so it is the share of the flow. In rounds (see iterative.py): config.rounds where
it is above one, else the paper's 100.

What is done so that the flow is linear and positive, and conserved from layer to layer:

* evaluation mode; a batch norm keeps |scale| / sqrt(running variance), its running mean is taken as zero;
* everything that is added (parameters called ...bias) is zero. A bias scores |b| * dR/db where weights are scored, and
  does not count in the gate of a channel;
* norms that divide by statistics of their own input (layer, group, instance) only scale;
* arithmetic is in float64, for R is a product of sums over all layers.

One sample of every input goes in, floating-point inputs as ones; integer inputs (voxel or cell indices) are those of
the first training sample, as they only say where things go. Maxima, scatter, grid sampling, interpolation and ReLU keep
the flow linear: a maximum passes it to the winner (equally to ties, which ones make plenty of), and what grid sampling
looks up outside the map is lost. Sigmoid, softmax, GELU, division by a norm or by a count that the input makes, and
products of two paths (gates, attention) are not linear: there scores are still finite shares but not conserved. A
layer that is one of several side by side carries its part only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from fusepress.pipeline.errors import StageError
from fusepress.pipeline.recipe import ScoreConfig
from fusepress.pipeline.scoring.altermoma import Grouped
from fusepress.pipeline.scoring.channels import ChannelScorer
from fusepress.pipeline.scoring.common import (
    WeightResult,
    channel_result,
    first_names,
    is_bias,
    weight_result,
    weights_of,
)
from fusepress.pipeline.scoring.gradients import Passes, Progress, silent
from fusepress.pipeline.scoring.iterative import CHANNELS_LEFT, Put, Rounds, channel_masks, least_of, weight_rounds
from fusepress.pipeline.scoring.result import ScoreResult
from fusepress.pipeline.scoring.substitute import Substitution
from fusepress.pipeline.task import LoadedTask

ROUNDS = 100
Note = Callable[[str, Tensor, Tensor], None]  # (name, |theta|, dR/d|theta| / R), both float64


def score_synflow(
    model: nn.Module,
    task: LoadedTask,
    graph: Grouped,
    config: ScoreConfig,
    *,
    seed: int,
    progress: Progress = silent,
) -> ScoreResult:
    """SynFlow of channels: the share of the flow that passes the channel's gate, in rounds.

    One pass of a single sample a round; holds |theta| dR/d|theta| in float64, two copies of the parameters.
    """
    groups = list(graph.groups)
    rounds = config.rounds if config.rounds > 1 else ROUNDS
    scorer = ChannelScorer(model, groups, "gate")
    flow = Flow(model=model, task=task, seed=seed, passes=Passes(total=rounds, progress=progress), hold=True)
    first = first_names(model)
    counted = {first[name] for name in scorer.parameters}
    parameters = dict(model.named_parameters(remove_duplicate=False))

    def score(_number: int, put: Put) -> None:
        products: dict[str, Tensor] = {}

        def note(name: str, value: Tensor, slope: Tensor) -> None:
            if name in counted:
                products[name] = torch.zeros_like(value) if is_bias(name) else value * slope

        def product(name: str) -> Tensor:
            found = products.get(first[name])
            return torch.zeros_like(parameters[name], dtype=torch.float64) if found is None else found

        flow.measure(note)
        for group in groups:
            put(group.id, scorer.signed(product, group.id).cpu())

    def remove(alive: Mapping[str, Tensor], _number: int) -> None:
        flow.masks = channel_masks(model, groups, alive)

    least = {group.id: (group.width, least_of(group)) for group in groups}
    plan = Rounds(least=least, rounds=rounds, left=CHANNELS_LEFT, like=torch.empty(0, dtype=torch.float64))
    with flow.ready():
        scores, counts = plan.run(score, remove)
    return channel_result(scores, groups, flow.log(counts))


def synflow_weights(
    model: nn.Module, task: LoadedTask, config: ScoreConfig, *, seed: int, progress: Progress = silent
) -> WeightResult:
    """SynFlow of single weights: holds the result; scores, masks and round numbers lie in temporary files till then."""
    rounds = config.rounds if config.rounds > 1 else ROUNDS
    values = weights_of(model, task)
    flow = Flow(model=model, task=task, seed=seed, passes=Passes(total=rounds, progress=progress))

    def score(_number: int, put: Put) -> None:
        flow.measure(lambda name, value, slope: put(name, (values[name].abs() if is_bias(name) else value) * slope))

    def remove(alive: Mapping[str, Tensor], _number: int) -> None:
        flow.masks = {name: alive[name].reshape(v.shape).to(v.device) for name, v in values.items()}

    with flow.ready():
        flat, counts = weight_rounds(values, rounds).run(score, remove)
    found = {name: part.reshape(values[name].shape) for name, part in flat.items()}
    return weight_result(model, task, found, flow.log(counts))


@dataclass(slots=True, kw_only=True)
class Flow:
    """A model with absolute weights, and the flow of ones through it. The model itself is not changed.

    Attributes:
        model: the network.
        task: gives the inputs' shapes and the integer inputs.
        seed: of the training sample that they are taken from.
        passes: counts and reports.
        masks: parameter name -> bool (True = kept); parameters left out are whole.
        totals: R of every measurement.
        hold: keep |theta| in float64 through a pass, two copies of the parameters, instead of making it for every use,
            which takes a fifth more time.
    """

    model: nn.Module
    task: LoadedTask
    seed: int
    passes: Passes
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    totals: list[float] = field(default_factory=list)
    hold: bool = False
    _inputs: dict[str, Tensor] = field(init=False)
    _buffers: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        device = next(self.model.parameters()).device
        batch = next(self.task.train_batches(self.seed))
        self._inputs = {
            name: torch.ones_like(value[:1], dtype=torch.float64, device=device)
            if value.is_floating_point()
            else value[:1].to(device)
            for name, value in batch.inputs.items()
        }
        means = {
            f"{path}.running_mean".lstrip(".")
            for path, module in self.model.named_modules()
            if isinstance(module, _BatchNorm)
        }
        self._buffers = {
            name: torch.zeros_like(buffer, dtype=torch.float64)
            if name in means
            else buffer.to(torch.float64, copy=True)
            for name, buffer in self.model.named_buffers()
            if buffer.is_floating_point()
        }

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Evaluation mode and linear norms; afterwards the model is as it was."""
        modes = {module: module.training for module in self.model.modules()}
        handles = [m.register_forward_hook(_only_scale) for m in modes if _divides_by_its_input(m)]
        devices = sorted({p.device.index for p in self.model.parameters() if p.device.type == "cuda"})
        with torch.random.fork_rng(devices=devices), torch.enable_grad():
            torch.manual_seed(self.seed)
            self.model.eval()
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()
                for module, mode in modes.items():
                    module.training = mode

    def measure(self, note: Note) -> None:
        """One pass forward and back; `note` gets every parameter that the flow reaches.

        Raises:
            StageError: the model cannot run in float64, or the flow is not finite.
        """
        parameters = {p: name for name, p in self.model.named_parameters() if p.is_floating_point()}
        absolute = {name: partial(self._absolute, name, p.detach()) for p, name in parameters.items()}
        if self.hold:
            values = {name: make().requires_grad_(True) for name, make in absolute.items()}
            for name, value in values.items():
                value.register_post_accumulate_grad_hook(_noting(name, note))
            self._back(self._forward(values))
        else:
            with Substitution(parameters, lambda name: absolute[name](), note) as substitution:
                self._back(self._forward({}))
                substitution.finish()
        self.passes.step("synflow")

    def _forward(self, values: Mapping[str, Tensor]) -> Any:
        try:
            return functional_call(self.model, {**values, **self._buffers}, args=(), kwargs=self._inputs)
        except RuntimeError as error:
            raise StageError(
                f"expected the model to run in float64 for SynFlow; got {error} in its forward pass; use x.to(y.dtype) "
                "for casts inside the model, or another score.method"
            ) from error

    def _back(self, outputs: Any) -> None:
        found = [value for value in self.task.as_dict(outputs).values() if value.is_floating_point()]
        total = torch.stack([value.sum() for value in found]).sum()
        self.totals.append(float(total.detach()))
        if not bool(total.isfinite()):
            raise StageError(
                f"expected a finite flow of ones; got {float(total)} in {type(self.model).__name__}; use another "
                "score.method, for the model divides or takes logarithms of what ones give"
            )
        if total.requires_grad and self.totals[-1]:
            (total / total.detach().abs()).backward()

    def _absolute(self, name: str, parameter: Tensor) -> Tensor:
        value = parameter.to(torch.float64, copy=True).abs_()
        if is_bias(name):
            value.zero_()
        if name in self.masks:
            value.mul_(self.masks[name])
        return value

    def log(self, counts: Sequence[int]) -> dict[str, Any]:
        """What the score file keeps: the flow of the dense model and of the last round, and the units scored."""
        return {
            "method": "synflow",
            "passes": self.passes.done,
            "seed": self.seed,
            "flow": [self.totals[0], self.totals[-1]],
            "scored": list(counts),
        }


def _noting(name: str, note: Note) -> Callable[[Tensor], None]:
    """Hand a gradient over as soon as it is complete, and drop it: no two gradients have to live at a time."""

    def hook(value: Tensor) -> None:
        assert value.grad is not None
        note(name, value.detach(), value.grad)
        value.grad = None

    return hook


def _divides_by_its_input(module: nn.Module) -> bool:
    if isinstance(module, _NormBase):
        return module.running_var is None
    return isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm))


def _only_scale(module: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> Tensor:
    (x,) = inputs
    weight = module.weight
    if not isinstance(weight, Tensor):
        return x
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return x * weight
    return x * weight.reshape(1, -1, *([1] * (x.ndim - 2)))
