"""Run only what a change touches: a forward pass kept as a tape of tensor operations.

The dense network runs once a batch under a recorder that sees every tensor operation below the user's Python code, so
any model can be recorded: there is nothing to trace, and no module needs to be known. Values are counted by memory and
version (a write in place makes a new version; views share their memory). From them follows what lies behind a change:
the operations that read a changed value, directly or not, and that reach an output. A replay executes these alone, on
the same shapes and with the same kernels as a full pass, and takes everything before them from the record.

What a tape cannot know is what the user's Python code would have done with other numbers. Where a changed tensor is
turned into a Python number, or gets another shape, the replay stops (`Diverged`), and the caller makes a full pass.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

Value = tuple[int, int]  # memory, version
Swap = Callable[[tuple[Any, ...], dict[str, Any]], Any]


class Diverged(Exception):
    """The Python code of the model could have taken another way with these numbers."""


class Unrecordable(Exception):
    """A tensor without plain memory (sparse, nested), or another order of operations than planned."""


@dataclass(frozen=True, slots=True)
class Ref:
    """A tensor as a window on a memory: its geometry, not its content."""

    memory: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype


@dataclass(slots=True)
class Op:
    """One operation of the tape.

    Attributes:
        func: the operator.
        args: its arguments, tensors as `Ref`.
        kwargs: named ones.
        outputs: what it returned, tensors as `Ref`.
        reads: values that it depends on.
        made: values that it makes (fresh memories and new versions).
        written: memories that it writes in place.
        scope: the watched module that it ran in, if any.
        macs: its multiply-accumulates.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: Any
    reads: tuple[Value, ...]
    made: tuple[Value, ...]
    written: frozenset[int]
    scope: str | None
    macs: int


@dataclass(slots=True, kw_only=True)
class Tape:
    """A recorded pass.

    Attributes:
        ops: in order; pure views are left out.
        outputs: the model's outputs by name, and the values that hold them.
        held: contents of values, as flat tensors over their whole memory.
        names: memories of parameters, buffers and inputs by name.
        origin: the tensor through which a value was made.
    """

    ops: list[Op] = field(default_factory=list)
    outputs: dict[str, tuple[Ref, Value]] = field(default_factory=dict)
    held: dict[Value, Tensor] = field(default_factory=dict)
    names: dict[str, int] = field(default_factory=dict)
    origin: dict[Value, Ref] = field(default_factory=dict)

    def content(self, value: Value, ref: Ref) -> Tensor:
        """A recorded tensor (not a copy)."""
        return _window(self.held[value], ref)

    def signature(self) -> list[tuple[Any, tuple[Value, ...], tuple[Value, ...]]]:
        """What must be equal for a schedule of one tape to fit another one."""
        return [(op.func, op.reads, op.made) for op in self.ops]


def _flat(tensor: Tensor) -> Tensor:
    """The whole memory behind a tensor, in one dimension."""
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.detach().untyped_storage())


def _window(content: Tensor, ref: Ref) -> Tensor:
    if content.dtype != ref.dtype:
        raise Diverged(f"a memory is read as {ref.dtype} and as {content.dtype}")
    here = (tuple(content.shape), content.stride(), content.storage_offset())
    if here == (ref.size, ref.stride, ref.offset):
        return content
    return content.as_strided(ref.size, ref.stride, ref.offset)


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


class Recorder(TorchDispatchMode):
    """Writes the tape.

    Args:
        named: parameters, buffers and inputs by name.
        keep: values whose content is needed later; None keeps all (for a small batch).
        watched: modules whose operations are marked with a name (branches), by name.
    """

    def __init__(
        self, named: Mapping[str, Tensor], keep: Collection[Value] | None, watched: Mapping[str, Sequence[nn.Module]]
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tape = Tape()
        self._keep = keep
        self._memory: dict[int, int] = {}  # by address of the storage
        # A weak reference keeps the address of a storage from being used again, but not its content alive.
        self._alive: list[StorageWeakRef] = []
        self._version: list[int] = []
        self._scopes: list[str] = []
        self._watched = watched
        for name, tensor in named.items():
            memory = self._known(tensor)
            self.tape.names[name] = memory
            self.tape.held.setdefault((memory, 0), _flat(tensor))
            self.tape.origin.setdefault((memory, 0), self._ref(tensor))

    def record(self, forward: Callable[[], Mapping[str, Tensor]]) -> Tape:
        """Run `forward` and return its tape.

        Raises:
            Unrecordable: a tensor has no plain memory.
        """
        hooks = []
        try:
            for name, modules in self._watched.items():
                for module in modules:
                    hooks.append(module.register_forward_pre_hook(lambda *_a, name=name: self._scopes.append(name)))
                    hooks.append(module.register_forward_hook(lambda *_a: (self._scopes.pop(), None)[1]))
            with torch.no_grad(), self:
                outputs = forward()
        finally:
            for hook in hooks:
                hook.remove()
        for name, tensor in outputs.items():
            ref = self._ref(tensor)
            value = (ref.memory, self._version[ref.memory])
            self.tape.outputs[name] = (ref, value)
            self.tape.held.setdefault(value, _flat(tensor))
        return self.tape

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        refs = tree_map_only(Tensor, self._ref, (args, kwargs))
        used = {ref.memory for ref in tree_leaves(refs) if isinstance(ref, Ref)}
        reads = tuple(sorted((memory, self._version[memory]) for memory in used))
        written = self._written(func, args, kwargs)
        for memory in written:
            self._save_before_write((memory, self._version[memory]))
        known = len(self._version)
        outputs = func(*args, **kwargs)
        for memory in written:
            self._version[memory] += 1
        out_refs = tree_map_only(Tensor, self._ref, outputs)
        made = [(memory, self._version[memory]) for memory in sorted(written)]
        made += [(memory, 0) for memory in range(known, len(self._version))]
        self._hold(made, (args, kwargs, outputs))
        alias_only = not made and any(isinstance(ref, Ref) for ref in tree_leaves(out_refs))
        if not alias_only:
            self.tape.ops.append(
                Op(
                    func=func,
                    args=refs[0],
                    kwargs=refs[1],
                    outputs=out_refs,
                    reads=reads,
                    made=tuple(made),
                    written=frozenset(written),
                    scope=self._scopes[-1] if self._scopes else None,
                    macs=_macs(func, args, kwargs, outputs),
                )
            )
        return outputs

    def _known(self, tensor: Tensor) -> int:
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError) as error:
            raise Unrecordable(f"a tensor of layout {tensor.layout} has no plain memory") from error
        memory = self._memory.get(storage._cdata)
        if memory is None:
            memory = self._memory[storage._cdata] = len(self._version)
            self._alive.append(StorageWeakRef(storage))
            self._version.append(0)
        return memory

    def _ref(self, tensor: Tensor) -> Ref:
        memory = self._known(tensor)
        ref = Ref(memory, tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset()), tensor.dtype)
        if self._version[memory] == 0 and (memory, 0) not in self.tape.origin:
            self.tape.origin[memory, 0] = ref
            if self._keep is None or (memory, 0) in self._keep:  # also of tensors that come from outside, e.g. numpy
                self.tape.held[memory, 0] = _flat(tensor)
        return ref

    def _written(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> set[int]:
        found: set[int] = set()
        for position, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = args[position] if position < len(args) else kwargs.get(argument.name)
                found |= {self._known(tensor) for tensor in _tensors(given)}
        return found

    def _save_before_write(self, value: Value) -> None:
        held = self.tape.held.get(value)
        if held is not None:
            self.tape.held[value] = held.clone()

    def _hold(self, made: Sequence[Value], trees: Any) -> None:
        missing = {value for value in made if value not in self.tape.held}
        for tensor in _tensors(trees):
            memory = self._known(tensor)
            value = (memory, self._version[memory])
            if value in missing:
                missing.discard(value)
                self.tape.origin.setdefault(value, self._ref(tensor))
                if self._keep is None or value in self._keep:
                    self.tape.held[value] = _flat(tensor)


def _macs(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> int:
    count = flop_registry.get(func.overloadpacket)
    return int(count(*args, **kwargs, out_val=outputs)) // 2 if count is not None else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """What a replay executes.

    Attributes:
        steps: positions on the tape.
        changed: values that the replay makes or is given.
        needs: recorded values that it reads.
        last: memories that can be forgotten after a step.
        targets: values that are wanted.
        macs: multiply-accumulates of the steps.
    """

    steps: tuple[int, ...]
    changed: frozenset[Value]
    needs: frozenset[Value]
    last: tuple[tuple[int, ...], ...]
    targets: tuple[Value, ...]
    macs: int


def schedule(tape: Tape, given: Collection[Value], targets: Sequence[Value], *, numbers: bool = True) -> Schedule:
    """What must run anew when the values `given` are others, to know the values `targets`.

    Operations that make a given value are not run: it is given. With `numbers`, those that hand a changed number to
    Python are run too, so that a replay can tell whether it is another one.
    """
    changed = set(given)
    dirty = []
    for position, op in enumerate(tape.ops):
        if not changed.isdisjoint(op.reads):
            dirty.append(position)
            changed.update(op.made)
    wanted = {value for value in targets if value in changed and value not in given}
    needs = {value for value in targets if value not in changed}
    steps = []
    for position in reversed(dirty):
        op = tape.ops[position]
        if wanted.isdisjoint(op.made) and not (numbers and _gives_number(op)):
            continue
        steps.append(position)
        for value in op.reads:
            (wanted if value in changed and value not in given else needs).add(value)
    needs -= set(given)
    steps.reverse()
    stays = {memory for memory, _ in targets}
    final: dict[int, int] = {}
    for position in steps:
        for memory, _ in (*tape.ops[position].reads, *tape.ops[position].made):
            final[memory] = position
    last = tuple(tuple(m for m, at in final.items() if at == position and m not in stays) for position in steps)
    return Schedule(
        steps=tuple(steps),
        changed=frozenset(changed),
        needs=frozenset(needs),
        last=last,
        targets=tuple(targets),
        macs=sum(tape.ops[position].macs for position in steps),
    )


def _gives_number(op: Op) -> bool:
    return not any(isinstance(leaf, Ref) for leaf in tree_leaves(op.outputs))


def replay(
    tape: Tape, plan: Schedule, given: Mapping[Value, Tensor], swaps: Mapping[int, Swap] | None = None
) -> dict[Value, Tensor]:
    """Run the steps of a schedule.

    Args:
        tape: holds what the schedule needs.
        plan: made with the keys of `given`.
        given: contents (flat over the memory, or the value's own tensor) that are not as recorded; never written.
        swaps: other functions for some positions of the tape.

    Returns:
        Contents of the schedule's targets.

    Raises:
        Diverged: a Python number or a shape came out differently.
    """
    env: dict[int, Tensor] = {memory: content for (memory, _), content in given.items()}
    shared = {memory for memory, _ in given}  # not ours to write
    saved: dict[Value, Tensor] = {}
    for position, finished in zip(plan.steps, plan.last, strict=True):
        op = tape.ops[position]
        at = dict(op.reads)
        for memory in op.written:
            if (memory, at[memory]) not in plan.changed:
                env[memory] = tape.held[memory, at[memory]].clone()
            elif memory in shared or (memory, at[memory]) in plan.targets:
                saved[memory, at[memory]] = env[memory]
                env[memory] = env[memory].clone()
                shared.discard(memory)

        def content(ref: Ref, at: Mapping[int, int] = at, op: Op = op) -> Tensor:
            value = (ref.memory, at[ref.memory])
            inside = value in plan.changed or ref.memory in op.written
            return _window(env[ref.memory] if inside else tape.held[value], ref)

        args, kwargs = tree_map_only(Ref, content, (op.args, op.kwargs))
        swap = (swaps or {}).get(position)
        outputs = swap(args, kwargs) if swap is not None else op.func(*args, **kwargs)
        _take(op, outputs, env)
        for memory in finished:
            env.pop(memory, None)
    return {v: saved.get(v, env[v[0]]) if v in plan.changed else tape.held[v] for v in plan.targets}


def _take(op: Op, outputs: Any, env: dict[int, Tensor]) -> None:
    """Put what an operation made where later ones look for it."""
    fresh = {memory for memory, _ in op.made} - op.written
    for ref, got in zip(tree_leaves(op.outputs), tree_leaves(outputs), strict=True):
        if not isinstance(ref, Ref):
            if ref != got and ref is not got:
                raise Diverged(f"{op.func} gives {got!r} instead of {ref!r}")
            continue
        if tuple(got.shape) != ref.size or got.dtype != ref.dtype:
            raise Diverged(f"{op.func} gives shape {tuple(got.shape)} instead of {ref.size}")
        if ref.memory in fresh:
            fresh.discard(ref.memory)
            same = tuple(got.stride()) == ref.stride and got.storage_offset() == ref.offset
            env[ref.memory] = got if same else like_recorded(got, ref)


def like_recorded(tensor: Tensor, ref: Ref) -> Tensor:
    """A tensor laid out in memory as its recorded one was.

    Raises:
        Diverged: the recorded one was a part of a larger memory.
    """
    if tuple(tensor.stride()) == ref.stride and tensor.storage_offset() == ref.offset:
        return tensor
    if ref.offset:
        raise Diverged("a result was a part of a larger memory")
    return torch.empty_strided(ref.size, ref.stride, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


__all__ = [
    "Diverged",
    "Op",
    "Recorder",
    "Ref",
    "Schedule",
    "Tape",
    "Unrecordable",
    "Value",
    "like_recorded",
    "replay",
    "schedule",
]
