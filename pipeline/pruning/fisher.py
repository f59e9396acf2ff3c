"""Functional Fisher information of each modality (MMPrune4U, eq. 6-10): how strongly the outputs answer to it.

The log-Sobolev inequality bounds the functional entropy of a non-negative f under a Gaussian N(m, Sigma) by

    E[f log f] - E[f] log E[f]  <=  1/2 E[ grad f' Sigma grad f / f ]

(eq. 7, which leaves Sigma out: without it the bound fails for variances above 1). The right side is what we estimate,
for f = S, the sensitivity of the outputs to a perturbed modality, sample by sample:

    z~_m = z_m + sigma_m * eps,  eps ~ N(0, 1)        all modalities at once
    S    = sum over heads of S_head(y(z~), y(z))
    I_m  = 1/2 mean over samples and draws of  sum_d sigma_md^2 (dS/dz~_md)^2 / (S + 1e-8)

S_head is the cross-entropy of y(z~) to the softmax of the clean y(z) for classes (mean over positions), the binary one
for single logits, and 1/2 mean((y(z~) - y(z))^2) / Var(head) + 1 for everything else; the task's `distill_kinds` says
which is which. The clean outputs are those of the network at hand, pruned or dense.

What is perturbed is z_m, the output of the modality's branch where the rest of the network reads it: a dense tensor,
also for a LiDAR whose points go through a voxelisation without gradient. Its sigma is the dense network's deviation of
each feature over the calibration samples, and the noise depends on seed, sample and draw alone, so that the dense and
all pruned networks get the same and no figure depends on the size of the batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fusepress.pipeline.errors import StageError
from fusepress.pipeline.pruning.curves import Floats
from fusepress.pipeline.pruning.replay import Ref, Schedule, Swap, Tape, Value, like_recorded, replay, schedule
from fusepress.pipeline.task import LoadedTask

VARIANCE_FLOOR = 1e-6
NOISE_BYTES = 2**28  # noise of a batch is kept for all options up to this size, and drawn again beyond


def information(sensitivity: Tensor, perturbed: Sequence[Tensor], deviations: Sequence[Tensor]) -> Tensor:
    """The integrand of the log-Sobolev bound.

    Args:
        sensitivity: S of every sample, (B,), made from `perturbed` by operations with gradient.
        perturbed: leaves with the samples in front, each (B, ...).
        deviations: sigma of each, broadcastable to it.

    Returns:
        1/2 sum_d sigma_d^2 g_d^2 / (S + 1e-8) of each leaf, (len(perturbed), B); 0 where S does not depend on it.
    """
    size = len(sensitivity)
    if not sensitivity.requires_grad:
        return sensitivity.new_zeros(len(perturbed), size)
    grads = torch.autograd.grad(sensitivity.sum(), list(perturbed), allow_unused=True)
    energy = [
        sensitivity.new_zeros(size) if g is None else (g * s).reshape(size, -1).square().sum(dim=1)
        for g, s in zip(grads, deviations, strict=True)
    ]
    return 0.5 * torch.stack(energy).detach() / (sensitivity.detach() + 1e-8)


def sensitivities(
    noisy: Mapping[str, Tensor], clean: Mapping[str, Tensor], kinds: Mapping[str, str], variance: Mapping[str, float]
) -> Tensor:
    """S of every sample, (B,): how far the outputs are from the clean ones.

    Args:
        noisy: outputs by name, (B, ...); classes in dim 1.
        clean: the same outputs without noise; they get no gradient.
        kinds: what an output means (classes, binary, anything else).
        variance: of the other outputs.
    """
    parts = []
    for name, value in noisy.items():
        reference = clean[name].detach()
        if kinds.get(name) == "classes":
            cross = F.cross_entropy(value, reference.softmax(dim=1), reduction="none")
        elif kinds.get(name) == "binary":
            cross = F.binary_cross_entropy_with_logits(value, reference.sigmoid(), reduction="none")
        else:
            cross = 0.5 * (value - reference).square() / variance[name] + 1
        parts.append(cross.reshape(len(cross), -1).mean(dim=1))
    return torch.stack(parts).sum(dim=0)


def boundaries(tape: Tape, modalities: Sequence[str]) -> dict[str, tuple[Value, ...]]:
    """What each branch makes and the rest of the network reads; nothing for a modality that it ignores."""
    maker = {value: op.scope for op in tape.ops for value in op.made}
    read: dict[Value, set[str | None]] = {}
    for op in tape.ops:
        for value in op.reads:
            read.setdefault(value, set()).add(op.scope)
    for _, value in tape.outputs.values():
        read.setdefault(value, set()).add(None)
    found: dict[str, tuple[Value, ...]] = {}
    for modality in modalities:
        values = [v for v, scope in maker.items() if scope == modality and read.get(v, {modality}) != {modality}]
        found[modality] = tuple(v for v in values if tape.origin[v].dtype.is_floating_point)
    return found


@dataclass(slots=True)
class Moments:
    """Running mean and variance over samples, merged batch by batch (Chan et al. 1979)."""

    count: int = 0
    mean: Tensor = field(default_factory=lambda: torch.zeros(()))
    squares: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, rows: Tensor) -> None:
        """Samples, (B, features)."""
        rows = rows.double()
        size, mean = len(rows), rows.mean(dim=0)
        gap = mean - self.mean.to(mean.device)
        total = self.count + size
        self.squares = self.squares.to(mean.device) + (rows - mean).square().sum(dim=0)
        self.squares += gap.square() * (self.count * size / total)
        self.mean = self.mean.to(mean.device) + gap * (size / total)
        self.count = total

    def deviation(self) -> Tensor:
        """Standard deviation of each feature, (features,), not below that of the floor."""
        return (self.squares / max(1, self.count)).clamp_min(VARIANCE_FLOOR).sqrt()


class Fisher:
    """Estimates the information of every modality from tapes of one structure.

    Args:
        tape: a recorded pass of `size` samples.
        size: its samples.
        task: says which modules are a branch and what outputs mean.
        draws: noise draws.
        samples: calibration samples that the information is estimated on, the first ones.
        seed: of the noise.

    Raises:
        StageError: a branch's output does not have the samples in front.
    """

    def __init__(self, tape: Tape, size: int, task: LoadedTask, *, draws: int, samples: int, seed: int) -> None:
        self.modalities = tuple(task.branches)
        self.values = boundaries(tape, self.modalities)
        self.draws = draws
        self.samples = samples
        self.seed = seed
        self.kinds = _kinds(task)
        self.variance: dict[str, float] = {}
        self._deviation: dict[Value, Tensor] = {}
        self._moments: dict[Value, Moments] = {value: Moments() for value in self.points}
        self._noise: dict[tuple[int, int], list[Tensor]] = {}
        self._noise_of = -1
        for modality, values in self.values.items():
            for value in values:
                _check_rows(tape.origin[value], tape.held[value], size, modality)

    @property
    def points(self) -> tuple[Value, ...]:
        """All values that are perturbed."""
        return tuple(dict.fromkeys(value for values in self.values.values() for value in values))

    def tail(self, tape: Tape, sources: Sequence[Value], targets: Sequence[Value]) -> Schedule:
        """What lies between the branches' outputs and the outputs, `sources` being other parameters."""
        return schedule(tape, (*self.points, *sources), targets, numbers=False)

    # ------------------------------------------------------------ statistics

    def learn(self, tape: Tape, size: int) -> None:
        """Take in the branches' dense outputs of a batch."""
        for value in self.points:
            self._moments[value].add(tape.content(value, tape.origin[value]).reshape(size, -1))

    def ready(self, variance: Mapping[str, float]) -> None:
        """All batches were taken in; `variance` is that of the outputs over them."""
        self.variance = dict(variance)
        self._deviation = {value: moments.deviation() for value, moments in self._moments.items()}
        self._moments = {}

    # -------------------------------------------------------------- estimate

    def estimate(
        self,
        tape: Tape,
        tail: Schedule,
        features: Mapping[Value, Tensor],
        clean: Mapping[str, Tensor],
        given: Mapping[Value, Tensor],
        swaps: Mapping[int, Swap],
        *,
        before: int,
    ) -> Floats:
        """Information of each modality, summed over those of the batch's samples that count, (M,); () where none does.

        Once for every width and draw, this is what the term costs: a forward and a backward pass from the branches on.
        Few samples may be enough: the dense and all pruned networks are compared on the same ones, with the same noise.

        Args:
            tape: recorded pass of the dense network.
            tail: made by `tail` for the same sources as `given` has.
            features: the branches' outputs of the network at hand (the values of `points`).
            clean: its outputs.
            given: its other parameters.
            swaps: its norms over channels.
            before: calibration samples before this batch.
        """
        size = len(next(iter(clean.values())))
        counted = min(size, self.samples - before)
        if counted <= 0:
            return np.zeros(0)
        total = np.zeros(len(self.modalities))
        for draw in range(self.draws):
            leaves, deviations = [], []
            contents = dict(given)
            for value, noise in zip(self.points, self._draw(tape, size, before, draw), strict=True):
                ref = tape.origin[value]
                base = _logical(features[value], ref).detach()
                deviation = self._deviation[value].to(base.dtype).view(1, -1)
                leaf = (base.reshape(size, -1) + deviation * noise).requires_grad_()
                leaves.append(leaf)
                deviations.append(deviation)
                contents[value] = like_recorded(leaf.view(ref.size), ref)
            with torch.enable_grad():
                made = replay(tape, tail, contents, swaps)
                noisy = {name: _logical(made[value], ref) for name, (ref, value) in tape.outputs.items()}
                rates = sensitivities(noisy, clean, self.kinds, self.variance)
                energy = information(rates, leaves, deviations)[:, :counted].sum(dim=1)
            each = dict(zip(self.points, energy.double().tolist(), strict=True))
            total += [sum(each[value] for value in self.values[m]) for m in self.modalities]
        return total / self.draws

    def _draw(self, tape: Tape, size: int, before: int, draw: int) -> list[Tensor]:
        """Noise of every point, (size, features) each: that of a sample is the same in whatever batch it comes."""
        if self._noise_of != before:
            self._noise, self._noise_of = {}, before
        kept = self._noise.get((size, draw))
        if kept is not None:
            return kept
        made = []
        for place, value in enumerate(self.points):
            ref, features = tape.origin[value], len(self._deviation[value])
            rows = torch.empty(size, features, dtype=ref.dtype)
            for row in range(size):
                seed = int(np.random.SeedSequence([self.seed, before + row, draw, place]).generate_state(1)[0])
                rows[row] = torch.randn(features, generator=torch.Generator().manual_seed(seed), dtype=ref.dtype)
            made.append(rows.to(tape.held[tape.outputs[next(iter(tape.outputs))][1]].device))
        if sum(rows.nbytes for rows in made) * self.draws <= NOISE_BYTES:
            self._noise[size, draw] = made
        return made


def _logical(content: Tensor, ref: Ref) -> Tensor:
    here = (tuple(content.shape), content.stride(), content.storage_offset())
    if here == (ref.size, ref.stride, ref.offset):
        return content
    return content.as_strided(ref.size, ref.stride, ref.offset)


def _check_rows(ref: Ref, content: Tensor, size: int, modality: str) -> None:
    numel = int(np.prod(ref.size))
    if (
        not ref.size
        or ref.size[0] % size
        or ref.offset
        or content.untyped_storage().nbytes() != numel * content.itemsize
    ):
        raise StageError(
            f"expected the branch of {modality!r} to give tensors with the samples in front, to measure its Fisher "
            f"information on; got shape {ref.size} for {size} samples; name other modules in the task's `branches`, "
            "or set prune.distortion.eta: 0"
        )


def _kinds(task: LoadedTask) -> dict[str, str]:
    declared: Any = getattr(task.user, "distill_kinds", {})
    return {str(name): str(kind) for name, kind in declared.items()} if isinstance(declared, dict) else {}


__all__ = ["Fisher", "Moments", "boundaries", "information", "sensitivities"]
