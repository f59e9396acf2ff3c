"""Coupled channel groups of any model: found twice, tested once, and what cannot be pruned with the reason.

The numeric finder (`dependence.py`) needs no tracer and sees through the user's own operations; torch-pruning's graph
(`trace.py`) is the second opinion. Every group then has to pass the equality test on the model itself (`check.py`).
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fusepress.pipeline.errors import TaskError, TraceError
from fusepress.pipeline.graph.apply import architecture_sha256
from fusepress.pipeline.graph.blocks import BlockSearch
from fusepress.pipeline.graph.check import Checker
from fusepress.pipeline.graph.dependence import OUT_OF_TIME, Bench, Forward, find_links, hash_seed, set_up, start
from fusepress.pipeline.graph.plan import Frozen, Group, GroupGraph
from fusepress.pipeline.graph.ports import Links, Port, assemble, inside, kind_of
from fusepress.pipeline.graph.trace import trace_links

T = TypeVar("T")
SAMPLES = 2  # of the example inputs: the test runs on a batch, the numeric finder on one sample
TRACER_SHARE = 0.25  # of the time limit, for torch-pruning
BLOCKS_SHARE = 0.5  # of what is left of it then, for the search for whole blocks
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}


def find_groups(
    model: nn.Module,
    example_inputs: dict[str, Tensor],
    branches: dict[str, list[str]],
    keep: Sequence[str] = (),
    *,
    blocks: bool = True,
    watchdog_s: float = 120,
) -> GroupGraph:
    """Find the channels that can be removed, and with which others.

    Args:
        model: the dense model; it is not changed in any way.
        example_inputs: inputs by name, batch first; two samples of them are used.
        branches: modality -> module paths.
        keep: module paths whose output channels stay (what they read may become narrower).
        blocks: look for whole residual blocks too, which takes longer than all the rest.
        watchdog_s: time limit in seconds.

    Returns:
        Groups that passed the equality test, and the frozen modules with reasons.

    Raises:
        TaskError: `keep` names a module that does not exist.
        TraceError: the model cannot be copied or run, is not repeatable, or the time is over.
    """
    known = {name for name, _ in model.named_modules()}
    for path in keep:
        if path not in known:
            raise TaskError(f"expected `keep` to name modules of the model; got {path!r}; see model.named_modules()")
    deadline = time.monotonic() + watchdog_s
    late = (
        f"expected the channel groups within {watchdog_s:g} s; got none yet at {type(model).__name__}; "
        "raise the limit, or give smaller example inputs"
    )
    return run_within(watchdog_s, lambda: _find(model, example_inputs, branches, keep, blocks, deadline, late), late)


def run_within(seconds: float, work: Callable[[], T], late: str) -> T:
    """Run `work` in a thread and stop it when the time is over (works in any thread, leaves signals alone).

    Raises:
        TraceError: with the message `late`.
    """
    done: list[T] = []
    failed: list[BaseException] = []
    threads = torch.get_num_threads()

    def target() -> None:
        torch.set_num_threads(threads)  # a new thread starts with the default
        try:
            done.append(work())
        except BaseException as error:  # noqa: BLE001 - it is raised again in the caller's thread
            failed.append(error)

    worker = threading.Thread(target=target, name="fusepress-watchdog", daemon=True)
    worker.start()
    try:
        worker.join(seconds)
    finally:
        if worker.is_alive():
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(worker.ident or 0), ctypes.py_object(_Late))
            worker.join(5)  # it stops at its next Python instruction
    if done:
        return done[0]
    if failed and not isinstance(failed[0], _Late):
        raise failed[0]
    raise TraceError(late)


class _Late(BaseException):
    """Raised inside a worker whose time is over; not an Exception, so that nothing swallows it."""


def _find(
    model: nn.Module,
    example_inputs: dict[str, Tensor],
    branches: dict[str, list[str]],
    keep: Sequence[str],
    blocks: bool,
    deadline: float,
    late: str,
) -> GroupGraph:
    def tick() -> None:
        if time.monotonic() > deadline:
            raise TraceError(late)

    tick()
    with _quiet_state(), torch.no_grad():
        bench, links = _probe(model, example_inputs, keep, deadline, late)
        groups, reasons = assemble(bench.ports, links, branches)
        kind = _working_type(model, example_inputs)
        torch.set_default_dtype(kind)
        inputs = _inputs_for(model, example_inputs, kind)
        checker = Checker(
            model=_jittered(_copy(model, kind)),
            inputs=inputs,
            forward=run_flat,
            tolerance=TOLERANCE[kind],
            tick=tick,
        )
        bad = checker.failures(groups)
        for group in groups:
            if group.id in bad:
                for producer in group.producers:
                    reasons.setdefault(producer.rpartition(".")[0], bad[group.id])
        groups = [group for group in groups if group.id not in bad]
        more, notes = _second_opinion(model, inputs, kind, bench, branches, groups, checker, deadline)
        groups = _in_order(groups + more, bench.ports)
        graph = GroupGraph(
            groups=tuple(groups),
            frozen=_frozen(model, bench, groups, reasons),
            arch_sha256=architecture_sha256(model),
            notes=tuple(notes),
            branches={branch: tuple(paths) for branch, paths in branches.items()},
        )
        return _with_blocks(graph, checker, deadline) if blocks else graph


def _with_blocks(graph: GroupGraph, checker: Checker, deadline: float) -> GroupGraph:
    """The graph with the groups that may have width 0; a search that runs out of time keeps what it has."""
    now = time.monotonic()
    search = BlockSearch(
        model=checker.model,
        inputs=checker.inputs,
        forward=checker.forward,
        tolerance=checker.tolerance,
        graph=graph,
        deadline=now + BLOCKS_SHARE * max(0.0, deadline - now),
    )
    blocks = search.find()
    late = f"no time to see whether {search.unsearched} groups are whole blocks"
    return replace(graph, blocks=blocks, notes=(*graph.notes, *([late] if search.unsearched else [])))


def _probe(
    model: nn.Module, example_inputs: dict[str, Tensor], keep: Sequence[str], deadline: float, late: str
) -> tuple[Bench, Links]:
    """The numeric finder, in float32: it compares for equality, so that more digits would say no more."""
    _working_type(model, example_inputs, (torch.float32,))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # hundreds of passes of tiny operations: waking threads would cost more than it saves
        inputs = _inputs_for(model, example_inputs, torch.float32, samples=1)
        bench = set_up(_copy(model, torch.float32), inputs, run_flat, deadline)
        for port in bench.ports.values():
            if port.name.startswith("out:") and any(inside(port.module, path) for path in keep):
                port.frozen = port.frozen or "kept by the task or the recipe"
        try:
            start(bench)
            return bench, find_links(bench)
        except TraceError:
            raise
        except Exception as error:  # noqa: BLE001 - the user's forward may raise anything on unusual values
            first = (str(error).strip().splitlines() or [""])[0][:120]
            links = Links()
            for port in bench.ports.values():
                links.freeze_port(
                    port, port.frozen or f"the forward pass fails on other values ({type(error).__name__}: {first})"
                )
            return bench, links
    except TraceError as error:
        if str(error) == OUT_OF_TIME:
            raise TraceError(late) from None
        raise TraceError(
            f"expected a repeatable forward pass in evaluation mode; got: {error}, at {type(model).__name__}; "
            "seed or remove what is random in forward()"
        ) from error
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def working_copy(
    model: nn.Module, example_inputs: dict[str, Tensor]
) -> Iterator[tuple[nn.Module, dict[str, Tensor], Forward, float]]:
    """A private copy to test on, with its parameters stirred: the copy, its inputs, how to run it, and the tolerance.

    Raises:
        TraceError: the model cannot be copied or run.
    """
    with _quiet_state(), torch.no_grad():
        kind = _working_type(model, example_inputs)
        torch.set_default_dtype(kind)
        yield _jittered(_copy(model, kind)), _inputs_for(model, example_inputs, kind), run_flat, TOLERANCE[kind]


@contextlib.contextmanager
def _quiet_state() -> Iterator[None]:
    """Global state of torch that the work changes is put back."""
    dtype, fast = torch.get_default_dtype(), torch.backends.mha.get_fastpath_enabled()
    try:
        with torch.random.fork_rng():
            torch.backends.mha.set_fastpath_enabled(False)  # it goes past the layers' own forward
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.backends.mha.set_fastpath_enabled(fast)


def run_flat(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Outputs of a model as a flat list of tensors, dict entries in their order."""
    return _flatten(model(**{name: value.clone() for name, value in inputs.items()}))


def _flatten(outputs: Any) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs]
    if isinstance(outputs, Mapping):
        outputs = list(outputs.values())
    if isinstance(outputs, (list, tuple)):
        return [tensor for part in outputs for tensor in _flatten(part)]
    return []


def _copy(model: nn.Module, kind: torch.dtype) -> nn.Module:
    try:
        private = copy.deepcopy(model)
    except Exception as error:
        raise TraceError(
            f"expected a model that copy.deepcopy can copy; got {type(error).__name__}: {error} "
            f"at {type(model).__name__}; do not keep computed tensors on the module"
        ) from error
    for parameter in private.parameters():
        parameter.grad = None
        parameter.requires_grad_(False)
    return private.to(kind).eval()


def _inputs_for(
    model: nn.Module, inputs: dict[str, Tensor], kind: torch.dtype, samples: int = SAMPLES
) -> dict[str, Tensor]:
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    chosen = {}
    for name, value in inputs.items():
        few = value[:samples].detach().to(device)
        chosen[name] = few.to(kind) if few.is_floating_point() else few
    return chosen


def _working_type(
    model: nn.Module, inputs: dict[str, Tensor], kinds: Sequence[torch.dtype] = tuple(TOLERANCE)
) -> torch.dtype:
    """The first type that the model runs in: float64 makes the test sharp, else float32."""
    error: Exception | None = None
    for kind in kinds:
        torch.set_default_dtype(kind)
        try:
            outputs = run_flat(_copy(model, kind), _inputs_for(model, inputs, kind))
        except TraceError:
            raise
        except Exception as caught:  # noqa: BLE001 - the user's forward may raise anything
            error = caught
            continue
        if not outputs:
            raise TraceError(
                f"expected tensors from forward(); got none at {type(model).__name__}; "
                "return a tensor or a dict of them"
            )
        return kind
    raise TraceError(
        f"expected forward(**inputs) to run on the example inputs; got {type(error).__name__}: {error} "
        f"at {type(model).__name__}; mend the model or the inputs' names"
    ) from error


def _jittered(model: nn.Module) -> nn.Module:
    """Stir the copy's parameters a little: a scale that starts at zero would hide mistakes from the test."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point():
                generator = torch.Generator().manual_seed(hash_seed(name))
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(noise.to(parameter) * 0.05 * (parameter.abs().mean() + 0.05))
    return model


def _second_opinion(
    model: nn.Module,
    inputs: dict[str, Tensor],
    kind: torch.dtype,
    bench: Bench,
    branches: dict[str, list[str]],
    groups: list[Group],
    checker: Checker,
    deadline: float,
) -> tuple[list[Group], list[str]]:
    """Groups that only torch-pruning found and that pass the test, and where the finders differ."""
    seconds = max(0.0, deadline - time.monotonic()) * TRACER_SHARE
    try:
        links = run_within(
            seconds, lambda: trace_links(_copy(model, kind), inputs, bench.ports), f"no answer within {seconds:.0f} s"
        )
        traced, _ = assemble(bench.ports, links, branches)
    except Exception as error:  # noqa: BLE001 - a tracer that fails costs the second opinion only
        first = (str(error).strip().splitlines() or [""])[0][:160]
        return [], [f"torch-pruning could not trace the model ({type(error).__name__}: {first})"]
    mine = {_shape_of(group): group.id for group in groups}
    agreed = sum(_shape_of(group) in mine for group in traced)
    taken = {producer for group in groups for producer in group.producers}
    kept = {port.axes[0].param for port in bench.ports.values() if port.role == "producer" and port.frozen}
    new = [group for group in traced if not taken.union(kept) & set(group.producers)]
    bad = checker.failures(new)
    more = [group for group in new if group.id not in bad]
    if more and checker.failures(groups + more):
        more = []
    notes = [f"torch-pruning sees {agreed} of the {len(groups)} groups in the same way"]
    notes += [f"only torch-pruning found {group.id}" for group in more]
    return more, notes


def _shape_of(group: Group) -> frozenset[tuple[str, int, int, int]]:
    return frozenset((m.param, m.dim, m.offset, m.stride) for m in group.members)


def _in_order(groups: list[Group], ports: dict[str, Port]) -> list[Group]:
    order = {axis.param: position for position, port in enumerate(ports.values()) for axis in port.axes}

    def first(group: Group) -> tuple[int, int]:
        makers = group.by_role("producer")
        return min(order[m.param] for m in makers), min(m.offset for m in makers)

    return sorted(groups, key=first)


def _frozen(model: nn.Module, bench: Bench, groups: list[Group], reasons: dict[str, str]) -> tuple[Frozen, ...]:
    covered: dict[str, int] = {}
    members = {member.param for group in groups for member in group.members}
    for group in groups:
        for member in group.by_role("producer"):
            covered[member.param] = covered.get(member.param, 0) + group.width * member.stride
    found = []
    for name, module in model.named_modules():
        own = [key for key, parameter in module._parameters.items() if parameter is not None]
        if not own:
            continue
        port = bench.ports.get(f"out:{name}")
        if port is not None:
            left = port.size - covered.get(port.axes[0].param, 0)
            if left > 0:
                why = reasons.get(name, "its channels are in no group that could be tested")
                found.append(Frozen(module=name, reason=why if left == port.size else f"{left} channels: {why}"))
        elif name not in bench.kinds and not any(f"{name}.{key}".lstrip(".") in members for key in own):
            found.append(Frozen(module=name or type(model).__name__, reason=_opaque(module)))
    return tuple(found)


def _opaque(module: nn.Module) -> str:
    if kind_of(module) is not None:
        return "the forward pass does not call it"
    return f"{type(module).__name__} is no standard layer: its own parameters could not be followed"


__all__ = ["find_groups", "run_flat", "run_within", "working_copy"]
