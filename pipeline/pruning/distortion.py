"""Distortion tables (RD-Prune, arXiv 2308.10438; MMPrune4U, eq. 1-3): what the width of each group does alone.

For a group i at a width w, everything else dense, the damage of a calibration sample is

    delta_i(w) = mean over the output heads of  mean over elements (y - y_w)^2 / Var(head)

with y the outputs before any softmax and Var the variance of a head's dense values over all samples and elements, so
that heads of other units weigh alike. A table holds the mean over the samples (or the maximum: `worst_case`). The group
keeps its best channels by score, ties to the lower number, exactly as the allocation will.

The dense network runs once a batch and is recorded (`replay`); for an option only what lies behind the group's
consumers is run again. What was measured is appended to a file as it comes, batch by batch and group by group, so that
a stopped measurement goes on where it stopped.

Processes that share a run measure a share of the batches each (number i is rank i mod world's) and hand the samples'
figures round after every batch, so that the tables are those of a single process; rank 0 alone writes the file.

`mode: approximate` measures all widths on a fifth of the samples, evenly spaced: an allocation follows the kinks of the
true curves, so that every width is measured and samples are saved.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fusepress.pipeline.distributed import broadcast_object, gather_objects, is_main, rank, world
from fusepress.pipeline.errors import StageError, TaskError
from fusepress.pipeline.graph.plan import Group, GroupGraph
from fusepress.pipeline.pruning.allocate import channel_order, kept_channels
from fusepress.pipeline.pruning.curves import Curve, DistortionTable, Floats, resolve_eta
from fusepress.pipeline.pruning.fisher import Fisher
from fusepress.pipeline.pruning.gating import Gate, gate_of, gated, gated_values, sources, swapped_norms
from fusepress.pipeline.pruning.replay import (
    Diverged,
    Recorder,
    Schedule,
    Tape,
    Unrecordable,
    Value,
    replay,
    schedule,
)
from fusepress.pipeline.recipe import DistortionConfig
from fusepress.pipeline.task import Batch, LoadedTask, cut_batch

Progress = Callable[[float, str], None]
FILE = "distortion.jsonl"
FORMAT = 1
SHARE = 1 / 5  # of the samples are measured in approximate mode, and not fewer than FEWEST
FEWEST = 8
TRIAL = 2  # samples on which every group's replay is held against a full pass
TOLERANCE = 1e-4  # of the largest output; the same kernels on the same shapes give the same bits on a CPU


def silent(_fraction: float, _text: str) -> None:
    """Progress that nobody watches."""


def distortion_table(
    model: nn.Module,
    task: LoadedTask,
    graph: GroupGraph,
    scores: Mapping[str, npt.NDArray[Any]],
    ladders: Mapping[str, tuple[int, ...]],
    config: DistortionConfig,
    *,
    seed: int,
    out: Path | None = None,
    progress: Progress = silent,
) -> DistortionTable:
    """Measure the damage of every width of every group.

    Args:
        model: the dense network; its tensors, modes and hooks are bit for bit as before afterwards.
        task: gives the calibration samples (split `calib`).
        graph: groups of the model.
        scores: one vector (width,) a group; higher = keep.
        ladders: group id -> widths, the dense one first, descending; 0 takes the whole group away.
        config: samples, mean or maximum, Fisher term, exact or approximate.
        seed: of the calibration batches and of the noise.
        out: folder for what has been measured (rank 0's counts); a measurement of the same question goes on there.
        progress: called with the fraction done and what is being done.

    Returns:
        A curve for every group of `ladders`.

    Raises:
        StageError: a ladder or scores that do not fit the groups.
        TaskError: no calibration samples, or outputs that cannot be compared.
    """
    started = time.perf_counter()
    options = _options(graph, scores, ladders)
    with _undisturbed(model):
        bench = Bench(model=model, task=task, options=options, config=config, seed=seed, progress=progress)
        store = Store(out if is_main() else None, lambda: _key(model, graph, options, config, seed, bench))
        store.start_alike()
        try:
            bench.measure(store)
        finally:
            store.close()
    return bench.table(store, time.perf_counter() - started)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """One group's widths, and the channels that each removes.

    Attributes:
        group: the group.
        widths: dense first, (K,).
        removed: channels that go at each width, K lists; the first is empty.
    """

    group: Group
    widths: tuple[int, ...]
    removed: tuple[tuple[int, ...], ...]


def _options(
    graph: GroupGraph, scores: Mapping[str, npt.NDArray[Any]], ladders: Mapping[str, tuple[int, ...]]
) -> list[Options]:
    known = {group.id: group for group in graph.groups}
    found = []
    for name in sorted(ladders, key=list(known).index if set(ladders) <= set(known) else None):
        widths = ladders[name]
        group = known.get(name)
        if group is None:
            raise StageError(f"expected ladders of this model's groups; got {name!r}; find the groups of this model")
        falls = all(a > b for a, b in itertools.pairwise(widths))
        if not widths or widths[0] != group.width or not falls or any(w < 0 or w % group.multiple for w in widths):
            raise StageError(
                f"expected widths from {group.width} downwards, multiples of {group.multiple}; got {widths} at {name}; "
                "make the ladder with ladder_widths"
            )
        order = channel_order(group, scores)
        kept = [set(kept_channels(group, order, width)) for width in widths]
        removed = tuple(tuple(c for c in range(group.width) if c not in keep) for keep in kept)
        found.append(Options(group=group, widths=widths, removed=removed))
    return found


@contextlib.contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; modes and buffers are put back."""
    training = {name: module.training for name, module in model.named_modules()}
    buffers = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        model.eval()
        torch.backends.mha.set_fastpath_enabled(False)  # it goes past the layers' own operations
        with torch.random.fork_rng():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        with torch.no_grad():
            for buffer, content in buffers.values():
                if not torch.equal(buffer, content):
                    buffer.copy_(content)
        for name, module in model.named_modules():
            module.training = training[name]


@dataclass(slots=True, kw_only=True)
class Route:
    """How the options of a group are run: by replay (for the Fisher term also from the branches on), or in full."""

    values: tuple[Value, ...] = ()
    plan: Schedule | None = None
    tail: Schedule | None = None
    why_plain: str | None = None


class Bench:
    """The measurement: one recorded pass a batch, then each group's options on it."""

    def __init__(
        self,
        *,
        model: nn.Module,
        task: LoadedTask,
        options: Sequence[Options],
        config: DistortionConfig,
        seed: int,
        progress: Progress,
    ) -> None:
        self.model = model
        self.task = task
        self.options = [one for one in options if len(one.widths) > 1]
        self.all_options = options
        self.config = config
        self.seed = seed
        self.progress = progress
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.notes: list[str] = []
        self.routes: dict[str, Route] = {}
        self.keep: set[Value] = set()
        self.signature: list[Any] = []
        self.macs: dict[str, int] = {}
        self.chosen: tuple[int, ...] | None = None
        self.fisher: Fisher | None = None
        self.dense_tail: Schedule | None = None
        self.seconds = {"dense": 0.0, "options": 0.0, "trial": 0.0, "fisher": 0.0}

    # ------------------------------------------------------------------ data

    def batches(self) -> Iterator[tuple[int, int, Batch]]:
        """(number, samples before it, batch) of the samples that are measured."""
        if self.chosen is None:
            yield from self.all_batches()
            return
        size = max(FEWEST, self.first().size)
        parts: list[dict[str, Tensor]] = []
        for _, before, batch in self.all_batches():
            rows = [k - before for k in self.chosen if before <= k < before + batch.size]
            parts.append({name: value[rows] for name, value in batch.inputs.items()})
        whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        for number, start in enumerate(range(0, len(self.chosen), size)):
            yield number, start, Batch(inputs={name: value[start : start + size] for name, value in whole.items()})

    def all_batches(self) -> Iterator[tuple[int, int, Batch]]:
        """(number, samples before it, batch) until the wanted samples are reached."""
        left = self.config.samples
        before = 0
        for number, batch in enumerate(self.task.batches("calib", self.seed)):
            if left <= 0:
                return
            part = batch if batch.size <= left else cut_batch(batch, left)
            yield number, before, part
            left -= part.size
            before += part.size

    def first(self) -> Batch:
        """The first calibration batch.

        Raises:
            TaskError: there is none.
        """
        found = next(self.all_batches(), None)
        if found is None:
            raise TaskError(
                f"expected calibration samples to measure distortion on; got none at {self.task.source.spec}; "
                "check batches('calib', seed)"
            )
        return found[2]

    def _inputs(self, batch: Batch) -> dict[str, Tensor]:
        return {name: value.to(self.device) for name, value in batch.inputs.items()}

    # --------------------------------------------------------------- forward

    def forward(self, inputs: Mapping[str, Tensor], size: int) -> dict[str, Tensor]:
        """Floating-point outputs by name.

        Raises:
            TaskError: there is none, or one without the samples in front.
        """
        outputs = {n: v for n, v in self.task.as_dict(self.model(**inputs)).items() if v.is_floating_point()}
        wrong = {name: tuple(value.shape) for name, value in outputs.items() if value.shape[:1] != (size,)}
        if wrong or not outputs:
            raise TaskError(
                f"expected floating-point outputs with {size} samples in front; got {wrong or 'none'} at "
                f"{type(self.model).__name__}; return outputs before any decoding"
            )
        return outputs

    def _record(self, batch: Batch, keep: set[Value] | None) -> Tape:
        inputs = self._inputs(batch)
        named: dict[str, Tensor] = dict(self.model.named_parameters(remove_duplicate=False))
        named |= dict(self.model.named_buffers())
        named |= {f"<input>.{name}": value for name, value in inputs.items()}
        watched = {m: [self.model.get_submodule(p) for p in paths] for m, paths in self.task.branches.items()}
        return Recorder(named, keep, watched).record(lambda: self.forward(inputs, batch.size))

    # ------------------------------------------------------------- structure

    def _learn(self) -> None:
        """Find out on a few samples what lies behind each group, and whether its replay equals a full pass."""
        started = time.perf_counter()
        small = cut_batch(self.first(), TRIAL)
        try:
            tape = self._record(small, None)
        except Unrecordable as error:
            self._all_plain(str(error))
            return
        self.signature = tape.signature()
        outputs = tuple(dict.fromkeys(value for _, value in tape.outputs.values()))
        targets = outputs
        if self.config.eta != 0:
            settings = self.config
            self.fisher = Fisher(
                tape,
                small.size,
                self.task,
                draws=settings.draws,
                samples=settings.fisher_samples,
                seed=self.seed,
            )
            self.dense_tail = self.fisher.tail(tape, (), outputs)
            targets = tuple(dict.fromkeys((*outputs, *self.fisher.points)))
            self.keep |= self.dense_tail.needs
        self.keep |= set(targets)
        for one in self.options:
            values = sources(tape, self.model, one.group)
            plan = schedule(tape, values, targets)
            route = Route(values=values, plan=plan)
            self.macs[one.group.id] = plan.macs // small.size
            route.why_plain = self._trial(tape, one, route, small)
            if route.why_plain:
                self.notes.append(f"{one.group.id}: measured by full passes, for {route.why_plain}")
            else:
                self.keep |= plan.needs
            if self.fisher is not None:
                route.tail = self.fisher.tail(tape, values, outputs)
                self.keep |= route.tail.needs
            self.routes[one.group.id] = route
        self.seconds["trial"] += time.perf_counter() - started

    def _all_plain(self, why: str) -> None:
        self.notes.append(f"all groups are measured by full passes, for {why}")
        self.routes = {one.group.id: Route(why_plain=why) for one in self.options}

    def _trial(self, tape: Tape, one: Options, route: Route, batch: Batch) -> str | None:
        gate = gate_of(self.model, one.group, one.removed[-1])
        try:
            got = self._replayed(tape, route, gate)
        except Diverged as error:
            return f"the path of its code depends on values ({error})"
        expected = self._plain(batch, gate)
        for name, value in expected.items():
            scale = float(value.abs().max())
            if got[name].shape != value.shape or float((got[name] - value).abs().max()) > TOLERANCE * scale:
                return "its replay is not what a full pass gives (does the model compute outside torch?)"
        return None

    # --------------------------------------------------------------- options

    def _replayed(self, tape: Tape, route: Route, gate: Gate) -> dict[str, Tensor]:
        contents = self._contents(tape, route, gate, gated_values(tape, gate, route.values))
        return _named_outputs(tape, contents)

    def _contents(self, tape: Tape, route: Route, gate: Gate, given: Mapping[Value, Tensor]) -> dict[Value, Tensor]:
        assert route.plan is not None
        with torch.no_grad():
            return replay(tape, route.plan, given, swapped_norms(tape, self.model, gate))

    def _plain(self, batch: Batch, gate: Gate) -> dict[str, Tensor]:
        with gated(self.model, gate), torch.no_grad():
            return self.forward(self._inputs(batch), batch.size)

    def _run(
        self, tape: Tape | None, one: Options, gate: Gate, batch: Batch, before: int, *, informed: bool
    ) -> tuple[dict[str, Tensor], list[float]]:
        """Outputs of one option, and, if wanted, each modality's information summed over the batch."""
        route = self.routes[one.group.id]
        if tape is not None and route.why_plain is None:
            try:
                given = gated_values(tape, gate, route.values)
                contents = self._contents(tape, route, gate, given)
                outputs = _named_outputs(tape, contents)
                tail = route.tail if informed else None
                return outputs, self._information(tape, tail, contents, outputs, given, gate, before)
            except Diverged:
                if self.fisher is not None:
                    raise self._no_information(one.group.id) from None
                note = (
                    f"{one.group.id}: some widths were measured by full passes, for the code's path depends on values"
                )
                if note not in self.notes:
                    self.notes.append(note)
        return self._plain(batch, gate), []

    def _information(
        self,
        tape: Tape,
        tail: Schedule | None,
        contents: Mapping[Value, Tensor],
        outputs: Mapping[str, Tensor],
        given: Mapping[Value, Tensor],
        gate: Gate | None,
        before: int,
    ) -> list[float]:
        if self.fisher is None or tail is None:
            return []
        started = time.perf_counter()
        swaps = swapped_norms(tape, self.model, gate) if gate is not None else {}
        try:
            found = self.fisher.estimate(tape, tail, contents, outputs, given, swaps, before=before)
        except RuntimeError as error:
            raise StageError(
                f"expected gradients of the outputs by the branches' outputs; got {str(error).splitlines()[0]} at "
                f"{type(self.model).__name__}; set prune.distortion.eta: 0, or write that operation out of place"
            ) from error
        self.seconds["fisher"] += time.perf_counter() - started
        return [float(value) for value in found]

    def _no_information(self, where: str) -> StageError:
        return StageError(
            "expected a network whose forward pass is made of torch operations alone, to perturb its branches; got "
            f"one that looks at values at {where}; set prune.distortion.eta: 0, or mend its forward pass"
        )

    def measure(self, store: Store) -> None:
        """Measure what the store lacks."""
        if not self.options:
            return
        self._learn()
        work = sum((len(one.widths) - 1) * max(1, self.macs.get(one.group.id, 1)) for one in self.options)
        if self.config.mode == "approximate":
            self._choose()
        wanted = self.config.samples if self.chosen is None else len(self.chosen)
        self._statistics(store)
        for number, before, batch in self.batches():
            if number % world() == rank():
                self._measure_batch(store, number, before, batch, work, wanted)
            if number % world() == world() - 1:
                store.exchange()
        store.exchange()
        self.notes = list(dict.fromkeys(itertools.chain(*gather_objects(self.notes))))

    def _measure_batch(self, store: Store, number: int, before: int, batch: Batch, work: int, wanted: int) -> None:
        """What the store lacks of one batch; `work` is that of all options, `wanted` the samples in all."""
        missing = [one for one in self.options if not store.has(number, one.group.id)]
        if not missing and store.has(number, ""):
            return
        tape, dense = self._dense(batch)
        if not store.has(number, ""):
            line = {"batch": number, "group": "", "size": batch.size, "moments": _moments(dense)}
            store.add(line | {"fisher": self._dense_information(tape, dense, before)})
        done = 0
        for one in missing:
            store.add({"batch": number, "group": one.group.id} | self._line(tape, one, dense, batch, before))
            done += (len(one.widths) - 1) * max(1, self.macs.get(one.group.id, 1))
            self.progress(min(1.0, (before + batch.size * done / work) / wanted), f"distortion of {one.group.id}")

    def _choose(self) -> None:
        """Which samples are measured: evenly spaced ones."""
        total = sum(batch.size for _, _, batch in self.all_batches())
        count = max(FEWEST, round(SHARE * total))
        if count < total:
            self.chosen = tuple(int(k) for k in np.linspace(0, total - 1, count).round())

    def _outputs_of(self, tape: Tape) -> dict[str, Tensor]:
        return {name: tape.content(value, ref) for name, (ref, value) in tape.outputs.items()}

    def _statistics(self, store: Store) -> None:
        """What the noise is scaled by: one dense pass over all samples before the measurement."""
        if self.fisher is None:
            if self.config.eta != 0:
                raise self._no_information("all groups")
            return
        plain = [name for name, route in self.routes.items() if route.why_plain is not None]
        if plain:
            raise self._no_information(plain[0])
        batches = list(self.batches())
        if all(store.has(n, g) for n, _, _ in batches for g in ("", *self.routes)):
            return
        moments = []
        for _, _, batch in batches:
            tape, dense = self._dense(batch)
            if tape is None:
                raise self._no_information("a batch of other structure")
            self.fisher.learn(tape, batch.size)
            moments.append(_moments(dense))
        self.fisher.ready(_variances(moments))

    def _dense_information(self, tape: Tape | None, dense: Mapping[str, Tensor], before: int) -> list[float]:
        if tape is None or self.fisher is None:
            return []
        features = {value: tape.held[value] for value in self.fisher.points}
        return self._information(tape, self.dense_tail, features, dense, {}, None, before)

    def _dense(self, batch: Batch) -> tuple[Tape | None, dict[str, Tensor]]:
        started = time.perf_counter()
        tape: Tape | None = None
        if any(route.why_plain is None for route in self.routes.values()):
            tape = self._record(batch, self.keep)
            if tape.signature() != self.signature:
                tape = None
                self._all_plain("the order of operations depends on the batch")
        if tape is None:
            with torch.no_grad():
                dense = self.forward(self._inputs(batch), batch.size)
        else:
            dense = self._outputs_of(tape)
        self.seconds["dense"] += time.perf_counter() - started
        return tape, dense

    def _line(
        self, tape: Tape | None, one: Options, dense: Mapping[str, Tensor], batch: Batch, before: int
    ) -> dict[str, Any]:
        """For every width but the dense one: mean squared differences by head and sample, information by modality."""
        started, fisher_before = time.perf_counter(), self.seconds["fisher"]
        squares: dict[str, list[list[float]]] = {name: [] for name in dense}
        fisher = []
        informed = _informed(one.widths, self.config.fisher_every)
        for k, removed in enumerate(one.removed[1:], start=1):
            gate = gate_of(self.model, one.group, removed)
            outputs, information = self._run(tape, one, gate, batch, before, informed=k in informed)
            fisher.append(information)
            for name, value in dense.items():
                gap = (outputs[name] - value).double().square().flatten(1).mean(dim=1)
                squares[name].append(gap.tolist())
        self.seconds["options"] += time.perf_counter() - started - (self.seconds["fisher"] - fisher_before)
        return {"squares": squares, "fisher": fisher}

    # ----------------------------------------------------------------- table

    def table(self, store: Store, seconds: float) -> DistortionTable:
        """Curves from everything that the store holds."""
        heads = store.lines("")
        samples = sum(int(line["size"]) for line in heads)
        variance = _variances([line["moments"] for line in heads])
        curves = {}
        for one in self.all_options:
            count = len(one.widths)
            distortion: Floats = np.zeros(count)
            if count > 1:
                parts = [
                    np.mean([np.array(line["squares"][name]) / variance[name] for name in variance], axis=0)
                    for line in store.lines(one.group.id)
                ]
                damage = np.concatenate(parts, axis=1)  # (K - 1, samples)
                distortion[1:] = damage.max(axis=1) if self.config.worst_case else damage.mean(axis=1)
            if not np.isfinite(distortion).all():
                raise StageError(
                    f"expected finite damage; got NaN or infinity at {one.group.id}; check the model's outputs on "
                    "the calibration samples"
                )
            fisher: Floats = np.zeros((count, 0))
            if self.config.eta != 0 and count > 1:
                fisher = self._fisher_curve(one, heads, store) / min(samples, self.config.fisher_samples)
            curves[one.group.id] = Curve(widths=one.widths, distortion=distortion, fisher=fisher)
        if self.chosen is not None:
            self.notes.append(f"approximate: {samples} of {self.config.samples} samples stand for all")
        elif samples < self.config.samples and self.options:
            self.notes.append(f"the calibration split has {samples} samples, not {self.config.samples}")
        return DistortionTable(
            curves=curves,
            eta=resolve_eta(curves, self.config),
            reading=self.config.reading,
            modalities=self.fisher.modalities if self.fisher is not None else (),
            samples=samples,
            macs=dict(self.macs),
            notes=tuple(self.notes),
            facts={"seconds": seconds, **{f"seconds_{name}": value for name, value in self.seconds.items()}},
        )

    def _fisher_curve(self, one: Options, heads: Sequence[Mapping[str, Any]], store: Store) -> Floats:
        """Information summed over its samples, (K, M): measured at some widths, linear in the width between them."""
        dense = np.sum([line["fisher"] for line in heads if line["fisher"]], axis=0)
        at = _informed(one.widths, self.config.fisher_every)
        lines = [line["fisher"] for line in store.lines(one.group.id) if any(line["fisher"])]
        less = np.sum([[line[k - 1] for k in at] for line in lines], axis=0)
        known = np.concatenate([dense[None], less])[::-1]  # by ascending width
        widths = np.array(one.widths)
        places = widths[[0, *at]][::-1]
        return np.stack([np.interp(widths, places, column) for column in known.T], axis=1)


def _informed(widths: Sequence[int], every: int) -> list[int]:
    """Places of a ladder, without the dense width, at which the information is measured.

    The narrowest is one of them. So are both sides of a removed block (width 0), for there the curve jumps.
    """
    last = len(widths) - 1
    gone = [last] if last and widths[last] == 0 else []
    return sorted({*range(last - len(gone), 0, -every), *gone})


def _named_outputs(tape: Tape, contents: Mapping[Value, Tensor]) -> dict[str, Tensor]:
    return {
        name: contents[value].as_strided(ref.size, ref.stride, ref.offset)
        for name, (ref, value) in tape.outputs.items()
    }


def _moments(outputs: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """Count, sum and sum of squares of each head."""
    return {
        n: [float(v.numel()), float(v.double().sum()), float(v.double().square().sum())] for n, v in outputs.items()
    }


def _variances(moments: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, float]:
    """Variance of each head over everything; for a constant head its mean square, and 1 where it is zero."""
    found = {}
    for name in moments[0] if moments else ():
        count, total, squares = np.sum([m[name] for m in moments], axis=0)
        square = float(squares / count)
        variance = square - float(total / count) ** 2
        found[name] = variance if variance > 1e-6 * square else (square or 1.0)
    return found


class Store:
    """What has been measured, one JSON line a batch and group; in memory alone where there is no folder.

    Args:
        folder: where the file lies.
        key: what identifies the question; asked for only if there is a folder.
    """

    def __init__(self, folder: Path | None, key: Callable[[], str]) -> None:
        self._lines: dict[tuple[str, int], dict[str, Any]] = {}
        self._own: list[dict[str, Any]] = []  # lines that the other processes do not have yet
        self._file: Any = None
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / FILE
        head = {"format": FORMAT, "key": key()}
        good = self._read(path, head)
        if good is None:
            good = json.dumps(head) + "\n"
        fresh = path.with_suffix(".tmp")
        fresh.write_text(good)
        fresh.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def _read(self, path: Path, head: Mapping[str, Any]) -> str | None:
        """The whole lines of a file that answers the same question; a torn last line is dropped."""
        try:
            text = path.read_text(encoding="utf-8")
        except (FileNotFoundError, UnicodeDecodeError):
            return None
        whole = text[: text.rfind("\n") + 1].splitlines()
        try:
            parsed = [json.loads(line) for line in whole]
        except ValueError:
            return None
        if not parsed or parsed[0] != head:
            return None
        for line in parsed[1:]:
            self._lines[line["group"], line["batch"]] = line
        return "\n".join(whole) + "\n"

    def has(self, batch: int, group: str) -> bool:
        """Whether a batch is done for a group ("" for the dense pass)."""
        return (group, batch) in self._lines

    def start_alike(self) -> None:
        """Give every process the lines that rank 0 has read."""
        self._lines = broadcast_object(self._lines)

    def exchange(self) -> None:
        """Give every process the lines that the others have added."""
        parts = gather_objects(self._own)
        self._own = []
        for number, lines in enumerate(parts):
            for line in lines if number != rank() else ():
                self._keep(line)

    def add(self, line: dict[str, Any]) -> None:
        """Keep a line of this process, on the disk (in rank 0) before this returns."""
        self._own.append(line)
        self._keep(line)

    def _keep(self, line: dict[str, Any]) -> None:
        self._lines[line["group"], line["batch"]] = line
        if self._file is not None:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def lines(self, group: str) -> list[dict[str, Any]]:
        """All lines of a group, by batch."""
        return [self._lines[key] for key in sorted(self._lines) if key[0] == group]

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def _key(
    model: nn.Module,
    graph: GroupGraph,
    options: Sequence[Options],
    config: DistortionConfig,
    seed: int,
    bench: Bench,
) -> str:
    """Hash of everything that the figures depend on."""
    digest = hashlib.sha256()
    facts = [graph.arch_sha256, [[o.group.id, list(o.widths), [list(r) for r in o.removed]] for o in options]]
    digest.update(json.dumps([facts, config.model_dump(mode="json"), seed], sort_keys=True).encode())
    batch = bench.first()
    digest.update("\0".join(batch.sample_ids).encode())
    for tensor in [*model.state_dict().values(), *(batch.inputs[name] for name in sorted(batch.inputs))]:
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


__all__ = ["Curve", "DistortionTable", "distortion_table"]
