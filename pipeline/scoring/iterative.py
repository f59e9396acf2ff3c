"""Scores in rounds: score, gate a part off, score the survivors again; and iterative magnitude pruning (IMP).

With R rounds and a last share k (a half of the channels, a tenth of the weights), k^(r/(R-1)) of all units are alive
after round r: 1 - (1-a)^r are gone, with a = 1 - k^(1/(R-1)). The last round scores what is left. So more rounds make
finer steps towards the same network, which is about the one that a budget asks for. With R = 1 nothing is gated.

A unit is gated off by zeroing everything of it (for a channel all members of its group: makers, scales and readers),
the lowest score in the whole model first, ties by position. No group loses its last tenth (and no last channel).

The rounds become one vector by offsets. Units that go in round r keep the score they had in that round; if the lowest
of a later round is not above the highest that went before, all scores of that later round are raised by the same
amount until it is. So whoever goes earlier ranks lower, differences within a round are kept, non-negative scores stay
non-negative, and scores that do not change when others go (random, plain magnitude) come out as in one shot.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fusepress.pipeline.graph.masks import MaskHolder
from fusepress.pipeline.graph.plan import Group
from fusepress.pipeline.recipe import ScoreConfig
from fusepress.pipeline.scoring.altermoma import Grouped
from fusepress.pipeline.scoring.common import (
    ChannelMethod,
    WeightMethod,
    WeightResult,
    channel_result,
    first_names,
    trainable_of,
    weight_result,
    weights_of,
)
from fusepress.pipeline.scoring.gradients import Passes, Progress, reactivate, silent
from fusepress.pipeline.scoring.masking import Snapshot, untouched
from fusepress.pipeline.scoring.norms import score_magnitude
from fusepress.pipeline.scoring.parking import parked, parked_zeros
from fusepress.pipeline.scoring.result import ScoreResult
from fusepress.pipeline.scoring.selection import blocks_of, kth_smallest
from fusepress.pipeline.task import LoadedTask

CHANNELS_LEFT = 0.5  # alive in the last round; budgets of 25 to 40 % of the MACs keep 50 to 63 % of the channels
WEIGHTS_LEFT = 0.1
FLOOR = 0.1  # of any group that is never gated off
APART = 1e-6  # relative distance between rounds, which float32 still tells apart

Put = Callable[[str, Tensor], None]  # (key, its scores of any shape)
Score = Callable[[int, Put], None]
Remove = Callable[[Mapping[str, Tensor], int], None]
Train = Callable[[MaskHolder, int, Progress], int]  # (masks to hold, round, progress) -> passes
Training = Callable[[Snapshot], Train]  # what the model was before -> how to train it between rounds


@dataclass(slots=True, kw_only=True)
class Rounds:
    """Which units are alive, and the scores of those that went.

    Holds one score a unit, and in bytes whether it is alive and which round it went in: in a file where there are as
    many units as parameters, until the result is made.

    Attributes:
        least: key (a group or a parameter) -> how many units it has, and how many of them never go.
        rounds: R.
        left: k, the share that is alive in the last round.
        like: of the dtype and on the device that scores have.
        in_file: whether scores and bytes lie in temporary files, on the CPU.
    """

    least: Mapping[str, tuple[int, int]]
    rounds: int
    left: float
    like: Tensor
    in_file: bool = False

    def run(self, score: Score, remove: Remove) -> tuple[dict[str, Tensor], list[int]]:
        """Score, remove, and so on.

        Args:
            score: called with the round; scores all units, alive or not, and puts them down key by key (a key that it
                leaves out has zeros).
            remove: called with which units are alive, key -> bool (n,), and the round that is over.

        Returns:
            Key -> one score a unit (n,), and how many units each round scored.
        """
        total = sum(size for size, _ in self.least.values())
        small = torch.int8 if self.rounds <= torch.iinfo(torch.int8).max else torch.int16
        result = self._filled(total, 0.0, self.like.dtype)
        alive = self._filled(total, value=True, dtype=torch.bool)
        gone_in = self._filled(total, self.rounds - 1, small)
        scores, on = self._by_key(result), self._by_key(alive)

        def put(key: str, values: Tensor) -> None:
            torch.where(on[key], values.flatten().to(scores[key]), scores[key], out=scores[key])

        counts = []
        for number in range(self.rounds):
            result.masked_fill_(alive, 0.0)
            score(number, put)
            counts.append(int(alive.sum()))
            if number + 1 < self.rounds:
                target = round(total * self.left ** ((number + 1) / (self.rounds - 1)))
                for drop, still, went in zip(
                    self._lowest(result, alive, counts[-1] - target), blocks_of(alive), blocks_of(gone_in), strict=True
                ):
                    still &= ~drop
                    went.masked_fill_(drop, number)
                remove(on, number)
        raised = raise_later_rounds(result, gone_in, self.rounds)
        return self._by_key(torch.empty_like(raised, device=self.like.device).copy_(raised)), counts

    def _filled(self, total: int, value: float, dtype: torch.dtype) -> Tensor:
        if self.in_file:
            return parked_zeros(torch.empty(total, dtype=dtype, device="meta")).fill_(value)
        return torch.full((total,), value, dtype=dtype, device=self.like.device)

    def _by_key(self, flat: Tensor) -> dict[str, Tensor]:
        sizes = [size for size, _ in self.least.values()]
        return dict(zip(self.least, flat.split(sizes), strict=True))

    def _lowest(self, scores: Tensor, alive: Tensor, count: int) -> Iterator[Tensor]:
        """Which are the `count` lowest units that are alive and may go (fewer where fewer may), ties by position.

        Yields:
            Booleans, block by block; the caller may change `alive` in a block that it has.
        """
        free = self._free(scores, alive)
        count = min(count, int(free.sum()))
        limit = kth_smallest([scores], count - 1, [free]) if count > 0 else -math.inf
        blocks = list(zip(blocks_of(scores), blocks_of(free), strict=True))
        ties = count - sum(int((may & (part < limit)).sum()) for part, may in blocks)
        for part, may in blocks:
            equal = (may & (part == limit)).nonzero().flatten()[: max(0, ties)]
            ties -= len(equal)
            drop = may & (part < limit)
            drop[equal] = True
            yield drop

    def _free(self, scores: Tensor, alive: Tensor) -> Tensor:
        """Which may go: those that are alive, but the best of every key that never go."""
        if not any(least for _, least in self.least.values()):
            return alive
        free = alive.clone()
        for (_, least), part, on in zip(
            self.least.values(), self._by_key(scores).values(), self._by_key(free).values(), strict=True
        ):
            if least:
                on[torch.where(on, part, -math.inf).argsort(descending=True, stable=True)[:least]] = False
        return free


def raise_later_rounds(scores: Tensor, gone_in: Tensor, rounds: int) -> Tensor:
    """Raise the scores of later rounds, each round by one amount, until they lie above those of earlier rounds.

    Args:
        scores: (N,), changed in place.
        gone_in: (N,), the round in which a unit went.
        rounds: number of rounds.

    Returns:
        The scores.
    """
    blocks = list(zip(blocks_of(scores), blocks_of(gone_in), strict=True))  # no copy of all scores at a time
    top: float | None = None
    for number in range(rounds):
        own = [(part, went == number) for part, went in blocks]
        low, high = _range(own)
        if low > high:
            continue
        if top is not None:
            margin = max(APART * max(abs(top), abs(low), abs(high)), 1e-30)
            lift = top + margin - low
            if lift > 0:
                for part, chosen in own:
                    part[chosen] = part[chosen].add_(lift)
                _, high = _range(own)
        top = high
    return scores


def _range(chosen: Sequence[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """Lowest and highest of the chosen elements of all blocks; (inf, -inf) where there are none."""
    extremes = [part[on].aminmax() for part, on in chosen if bool(on.any())]
    return min((float(e.min) for e in extremes), default=math.inf), max(
        (float(e.max) for e in extremes), default=-math.inf
    )


def score_in_rounds(
    method: ChannelMethod,
    model: nn.Module,
    task: LoadedTask,
    graph: Grouped,
    config: ScoreConfig,
    *,
    seed: int,
    progress: Progress = silent,
    training: Training | None = None,
    name: str | None = None,
) -> ScoreResult:
    """Any channel method in `config.rounds` rounds; see the module's text.

    The parameters to set back lie in temporary files, so the peak is the method's own.

    Args:
        method: scores all channels of the model as it stands.
        model: comes back bit-identical.
        task: its data, losses and branches.
        graph: the coupled groups.
        config: rounds, and whatever the method reads.
        seed: of the training batches.
        progress: called with the fraction done and a text.
        training: makes the training of the gated model between rounds, the masks held.
        name: what the log calls it; default: config.method.
    """
    groups = list(graph.groups)
    least = {group.id: (group.width, least_of(group)) for group in groups}
    rounds = Rounds(least=least, rounds=config.rounds, left=CHANNELS_LEFT, like=torch.empty(0, dtype=torch.float64))
    log = _Log(rounds=config.rounds, progress=progress, trains=training is not None)

    def score(number: int, put: Put) -> None:
        _set_trainable(model, snapshot)
        result = method(model, task, graph, config, seed=seed, progress=log.part(number, 0))
        log.add(result.log)
        for key, vector in result.channel.items():
            put(key, torch.from_numpy(vector))

    def remove(alive: Mapping[str, Tensor], number: int) -> None:
        holder = MaskHolder(channel_masks(model, groups, alive))
        holder.apply(model)
        if training is not None:
            log.passes += training(snapshot)(holder, number, log.part(number, 1))

    with untouched(model, seed=seed, copy=parked) as snapshot:
        scores, counts = rounds.run(score, remove)
    progress(1.0, "rounds")
    return channel_result(scores, groups, log.finished(name or config.method, seed, counts))


def least_of(group: Group) -> int:
    """How many channels of a group are never gated off."""
    return max(1, group.multiple, math.ceil(FLOOR * group.width))


def channel_masks(model: nn.Module, groups: Sequence[Group], alive: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks (True = kept) over every parameter that a gated channel runs through, readers included.

    Args:
        model: the network.
        groups: the coupled groups.
        alive: group id -> which channels are on (width,).
    """
    parameters, first = dict(model.named_parameters(remove_duplicate=False)), first_names(model)
    masks: dict[str, Tensor] = {}
    for group in groups:
        off = (~alive[group.id]).nonzero().flatten().tolist()
        for member in group.members if off else ():
            if member.param in parameters:
                parameter = parameters[member.param]
                mask = masks.setdefault(first[member.param], torch.ones_like(parameter, dtype=torch.bool))
                mask.index_fill_(member.dim, torch.tensor(member.indices(off), device=parameter.device), value=False)
    return masks


def weights_in_rounds(
    method: WeightMethod,
    model: nn.Module,
    task: LoadedTask,
    config: ScoreConfig,
    *,
    seed: int,
    progress: Progress = silent,
) -> WeightResult:
    """Any weight method in `config.rounds` rounds, as for channels; layers may lose all their weights.

    What rounds hold (theta, a score a weight, masks and round numbers) lies in temporary files while the method scores,
    so the peak is the method's own, or the result's one copy.
    """

    def score(put: Put, part: Progress) -> dict[str, Any]:
        scores, found = method(model, task, config, seed=seed, progress=part)
        for key, value in scores.items():
            put(key, value)
        return found

    return _weights_in_rounds(score, model, task, config, seed=seed, progress=progress)


def _weights_in_rounds(
    method: Callable[[Put, Progress], dict[str, Any]],
    model: nn.Module,
    task: LoadedTask,
    config: ScoreConfig,
    *,
    seed: int,
    progress: Progress,
    training: Training | None = None,
    name: str | None = None,
) -> WeightResult:
    """`weights_in_rounds` of a method that puts its scores down one by one and returns its log."""
    values = weights_of(model, task)
    rounds = weight_rounds(values, config.rounds)
    log = _Log(rounds=config.rounds, progress=progress, trains=training is not None)

    def score(number: int, put: Put) -> None:
        _set_trainable(model, snapshot)
        log.add(method(put, log.part(number, 0)))

    def remove(alive: Mapping[str, Tensor], number: int) -> None:
        holder = MaskHolder({key: on.reshape(values[key].shape) for key, on in alive.items()})
        holder.apply(model)
        if training is not None:
            log.passes += training(snapshot)(holder, number, log.part(number, 1))

    with untouched(model, seed=seed, copy=parked) as snapshot:
        flat, counts = rounds.run(score, remove)
    progress(1.0, "rounds")
    whole = {key: part.reshape(values[key].shape) for key, part in flat.items()}
    return weight_result(model, task, whole, log.finished(name or config.method, seed, counts))


def weight_rounds(values: Mapping[str, Tensor], rounds: int) -> Rounds:
    """Rounds over single weights: no layer is spared."""
    least = {key: (value.numel(), 0) for key, value in values.items()}
    like = next(iter(values.values()))
    return Rounds(least=least, rounds=rounds, left=WEIGHTS_LEFT, like=like, in_file=True)


@dataclass(slots=True, kw_only=True)
class _Log:
    """Passes and logs of all rounds, and the part of the progress bar that each step moves."""

    rounds: int
    progress: Progress
    trains: bool
    passes: int = 0
    entries: list[dict[str, Any]] | None = None

    def part(self, number: int, step: int) -> Progress:
        steps = self.rounds * (2 if self.trains else 1)
        start = number * (2 if self.trains else 1) + step
        return lambda done, text: self.progress((start + done) / steps, f"round {number + 1}: {text}")

    def add(self, log: Mapping[str, Any]) -> None:
        self.passes += log["passes"]
        self.entries = [*(self.entries or []), {key: value for key, value in log.items() if key != "branches"}]

    def finished(self, name: str, seed: int, counts: Sequence[int]) -> dict[str, Any]:
        rounds = [{"scored": count, **entry} for count, entry in zip(counts, self.entries or [], strict=True)]
        return {"method": name, "seed": seed, "passes": self.passes, "rounds": rounds}


def score_imp(
    model: nn.Module,
    task: LoadedTask,
    graph: Grouped,
    config: ScoreConfig,
    *,
    seed: int,
    progress: Progress = silent,
) -> ScoreResult:
    """Iterative magnitude pruning (Han et al. 2015; Frankle & Carbin 2019) of channels, with training between rounds.

    Between rounds the gated model trains for `config.reactivation_batches` steps at `config.reactivation_lr`, each time
    on fresh batches, with running statistics frozen and masks held; the weights go on, they are not rewound. One round
    is one-shot magnitude. The model comes back bit-identical.
    """
    training = masked_training(model, task, config, seed)
    return score_in_rounds(
        score_magnitude, model, task, graph, config, seed=seed, progress=progress, training=training, name="imp"
    )


def imp_weights(
    model: nn.Module, task: LoadedTask, config: ScoreConfig, *, seed: int, progress: Progress = silent
) -> WeightResult:
    """Iterative magnitude pruning of single weights; see `score_imp`.

    Holds one copy, the result; what rounds keep lies in temporary files. The gradients' copy is not held where SGD
    trains (Adam holds it, and two more of its own).
    """

    def score(put: Put, part: Progress) -> dict[str, Any]:
        for key, value in weights_of(model, task).items():
            put(key, value.abs())
        part(1.0, "magnitude")
        return {"method": "magnitude", "passes": 0, "seed": seed}

    training = masked_training(model, task, config, seed)
    return _weights_in_rounds(score, model, task, config, seed=seed, progress=progress, training=training, name="imp")


def masked_training(model: nn.Module, task: LoadedTask, config: ScoreConfig, seed: int) -> Training:
    """Training between rounds: `config.reactivation_batches` steps, every masked weight held at zero."""

    def train(snapshot: Snapshot, holder: MaskHolder, number: int, progress: Progress) -> int:
        parameters = trainable_of(snapshot)
        for parameter in parameters:
            parameter.requires_grad_(True)
        steps = config.reactivation_batches
        batches = itertools.islice(task.train_batches(seed, start=number * steps), steps)
        done = reactivate(
            model,
            task,
            parameters,
            batches,
            Passes(total=steps, progress=progress),
            optimizer=config.reactivation_optimizer,
            lr=config.reactivation_lr,
            where=f"training after round {number + 1}",
            after_step=lambda: holder.apply(model),
            at_once=True,
        )
        model.zero_grad(set_to_none=True)
        return done

    return lambda snapshot: partial(train, snapshot)


def _set_trainable(model: nn.Module, snapshot: Snapshot) -> None:
    """Flags as the user gave them: a method that trains inside must see what is frozen."""
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in snapshot.trainable)
