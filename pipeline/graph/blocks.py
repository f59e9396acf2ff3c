"""Whole residual blocks: coupled groups that may have width 0.

Without any channel of a group its readers return a constant (their bias). That removes a block where the constant is
only ever added to signals that other layers feed. Whether it is, the model itself says: with the constant in place,
every channel that it reaches must still follow the inputs, and every output the inputs that it followed before. What
then feeds nothing but constants is found by differentiation and goes as well. The proof is the one of every group: the
model after surgery equals the gated one. Source of the idea: MDP (arXiv 2504.02168), which removes blocks together with
channels under a latency budget; there blocks are named by hand.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fusepress.pipeline.graph.apply import apply_plan, architecture_sha256, gate_model
from fusepress.pipeline.graph.check import relative_gap, sample_kept
from fusepress.pipeline.graph.dependence import Forward, hash_seed
from fusepress.pipeline.graph.plan import Block, Group, GroupGraph, Swap, SwapKind
from fusepress.pipeline.graph.ports import channel_dim, kind_of
from fusepress.pipeline.graph.standins import LAYERS, Geometry

VARYING = 0.1  # share of the channels that must still follow the inputs; ReLU may silence many, a cut silences all
PRUNED = 0.25  # share of the other groups' channels that is gone when all blocks are tested together
Key = tuple[str, int]  # module path, number of the call


@dataclass(slots=True)
class _Seen:
    """What one pass showed: every layer's input, and the outputs."""

    inputs: dict[Key, Tensor] = field(default_factory=dict)
    outputs: list[Tensor] = field(default_factory=list)
    called: set[str] = field(default_factory=set)


@dataclass(slots=True, kw_only=True)
class _Follows:
    """What follows the inputs: channels of every layer's input, and elements of every output by disturbed input."""

    channels: dict[Key, Tensor]
    outputs: list[list[Tensor]]


@dataclass(slots=True, kw_only=True)
class _Outline:
    """What goes with a group.

    Attributes:
        dead: layers that feed nothing without it, some of its readers maybe among them.
        folds: batch norm -> the one reader that it reads.
        follows: whether what the readers' constants reach still follows the inputs.
        broadcasts: whether the model runs with the constants at one position.
    """

    dead: set[str]
    folds: dict[str, str]
    follows: bool
    broadcasts: bool = False


@dataclass(slots=True)
class _Watch:
    """Watches one sample run through a float32 copy, dense or with constants in place of some layers."""

    model: nn.Module
    inputs: dict[str, Tensor]
    forward: Forward
    trials: list[dict[str, Tensor]] = field(default_factory=list)
    together: dict[str, Tensor] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    called: set[str] = field(default_factory=set)
    dense: _Follows = field(default_factory=lambda: _Follows(channels={}, outputs=[]))

    @classmethod
    def of(cls, model: nn.Module, inputs: Mapping[str, Tensor], forward: Forward) -> _Watch:
        """Look at the dense model: what it uses, and what follows which input."""
        few = {name: x[:1].float() if x.is_floating_point() else x[:1] for name, x in inputs.items()}
        watch = cls(copy.deepcopy(model).float(), few, forward)
        with _precision(torch.float32):
            base = watch._observe(few, record=True)
            for name, value in few.items():
                trial = {**few, name: _disturbed(name, value)}
                try:
                    watch._observe(trial)
                except Exception:  # noqa: BLE001, S112 - values that the model cannot take say nothing of its blocks
                    continue
                watch.trials.append(trial)
                watch.together[name] = trial[name]
            watch.used, watch.called = watch._reached(base.outputs), base.called
            watch.dense = watch._follow(base, watch.trials)
        return watch

    def outline(self, readers: list[str]) -> _Outline:
        """One pass with constants for what these readers make."""
        with _precision(torch.float32), self._constants(readers) as norms:
            base = self._observe(self.inputs, record=True)
            folds = {norm: next(iter(sources)) for norm, sources in norms.items() if len(sources) == 1}
            dead = self._dead(base)
            now = self._follow(base, [{**self.inputs, **self.together}])
            outline = _Outline(
                dead=dead,
                folds={norm: reader for norm, reader in folds.items() if reader},
                follows=self._reached_follow(base, now, readers, dead),
            )
        if outline.follows:
            outline.broadcasts = self._broadcasts(readers, base)
        return outline

    def _broadcasts(self, readers: list[str], base: _Seen) -> bool:
        with _precision(torch.float32), self._constants(readers, narrow=True):
            try:
                outputs = self._observe(self.inputs).outputs
            except Exception:  # noqa: BLE001 - the user's code wants the full size
                return False
        return [o.shape for o in outputs] == [o.shape for o in base.outputs]

    def _dead(self, base: _Seen) -> set[str]:
        """Layers that worked in the dense model and feed nothing now."""
        used = self._reached(base.outputs)
        alive = {name.rpartition(".")[0] for name in used}
        lost = {param.rpartition(".")[0] for param in self.used - used}
        return (lost - alive) & self.called

    def _reached(self, outputs: list[Tensor]) -> set[str]:
        """Parameters that outputs are differentiable by. Without the others nothing changes, which is proved later."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        found: set[str] = set()
        stack = [output.grad_fn for output in outputs if output.grad_fn is not None]
        met = set(stack)
        while stack:
            node = stack.pop()
            leaf = getattr(node, "variable", None)
            if leaf is not None and id(leaf) in names:
                found.add(names[id(leaf)])
            for after, _ in node.next_functions:
                if after is not None and after not in met:
                    met.add(after)
                    stack.append(after)
        return found

    def _observe(self, inputs: dict[str, Tensor], *, record: bool = False) -> _Seen:
        seen = _Seen()
        calls: dict[str, int] = {}
        hooks = []
        for name, module in self.model.named_modules():
            kind = kind_of(module)
            if kind is not None:
                hooks.append(module.register_forward_pre_hook(_recorder(name, kind, seen, calls), with_kwargs=True))
        try:
            torch.manual_seed(0)
            with torch.set_grad_enabled(record):
                self.model.requires_grad_(record)
                seen.outputs = self.forward(self.model, inputs)
        finally:
            self.model.requires_grad_(False)
            for hook in hooks:
                hook.remove()
        return seen

    def _follow(self, base: _Seen, trials: list[dict[str, Tensor]]) -> _Follows:
        channels: dict[Key, Tensor] = {}
        outputs = []
        for trial in trials:
            seen = self._observe(trial)
            for key, hit in self._changes(base, seen).items():
                channels[key] = channels[key] | hit if key in channels else hit
            outputs.append([a != b for a, b in zip(base.outputs, seen.outputs, strict=True)])
        return _Follows(channels=channels, outputs=outputs)

    def _changes(self, base: _Seen, other: _Seen) -> dict[Key, Tensor]:
        """Which input channels of which calls differ between two passes."""
        changed = {}
        for key, x in base.inputs.items():
            dim = channel_dim(self.model.get_submodule(key[0]), x)
            over = [d for d in range(x.ndim) if d != dim]
            different = x != other.inputs[key]
            changed[key] = different.any(dim=over) if over else different
        return changed

    @contextlib.contextmanager
    def _constants(self, readers: list[str], *, narrow: bool = False) -> Iterator[dict[str, set[str]]]:
        """Readers return their bias at full size; yields the batch norms that read one, with whose output they read."""
        made: dict[int, tuple[str, Tensor]] = {}
        norms: dict[str, set[str]] = {}
        hooks = []
        for name, module in self.model.named_modules():
            if isinstance(module, _BatchNorm) and module.running_mean is not None:
                hooks.append(module.register_forward_pre_hook(_norm_recorder(name, made, norms), with_kwargs=True))
        kept = {}
        for name in readers:
            module = self.model.get_submodule(name)
            kept[name] = module.__dict__.get("forward")
            module.forward = _constant(name, module, made, narrow)
        try:
            yield norms
        finally:
            for hook in hooks:
                hook.remove()
            for name, old in kept.items():
                module = self.model.get_submodule(name)
                del module.forward
                if old is not None:
                    module.forward = old

    def follows_without(self, readers: list[str]) -> bool:
        """Whether all that the readers' constants reach still follows the inputs, and the outputs all inputs."""
        with _precision(torch.float32), self._constants(readers):
            base = self._observe(self.inputs, record=True)
            now = self._follow(base, self.trials)
            for before, after in zip(self.dense.outputs, now.outputs, strict=True):
                if any(bool(a.any()) and not bool(b.any()) for a, b in zip(before, after, strict=True)):
                    return False
            return self._reached_follow(base, now, readers, self._dead(base))

    def _reached_follow(self, base: _Seen, now: _Follows, readers: list[str], dead: set[str]) -> bool:
        shifted = self._shifted(readers)
        for key, hit in self._changes(base, shifted).items():
            if key[0] in dead or key[0] in readers:
                continue
            if not _mostly(self.dense.channels[key] & hit, now.channels[key]):
                return False
        for k, (a, b) in enumerate(zip(base.outputs, shifted.outputs, strict=True)):
            before, after = (torch.stack([trial[k] for trial in f.outputs]).any(0) for f in (self.dense, now))
            if not _mostly(before & (a != b), after):
                return False
        return True

    def _shifted(self, readers: list[str]) -> _Seen:
        """A pass with other constants."""
        hooks = []
        for name in readers:
            generator = torch.Generator().manual_seed(hash_seed(name))

            def shift(_m: nn.Module, _i: object, out: Tensor, generator: torch.Generator = generator) -> Tensor:
                noise = torch.rand(out.shape, generator=generator, dtype=torch.float64)
                return out + (0.5 + noise).to(out)

            hooks.append(self.model.get_submodule(name).register_forward_hook(shift))
        try:
            return self._observe(self.inputs)
        finally:
            for hook in hooks:
                hook.remove()


@dataclass(slots=True, kw_only=True)
class BlockSearch:
    """The search on a private copy of the model in evaluation mode, its parameters stirred so that none is zero.

    Attributes:
        model: the copy; it is left as it was.
        inputs: example inputs of the copy's type.
        forward: runs a model and flattens its outputs.
        tolerance: largest relative difference between surgery and gate.
        graph: the groups.
        deadline: when to stop, in seconds of `time.monotonic`.
        unsearched: groups that there was no time for.
    """

    model: nn.Module
    inputs: dict[str, Tensor]
    forward: Forward
    tolerance: float
    graph: GroupGraph
    deadline: float = float("inf")
    unsearched: int = 0
    _watch: _Watch = field(init=False)
    _trains: bool = False

    def find(self) -> tuple[Block, ...]:
        """Blocks in the order of their groups; any of them may be removed, with or without the others."""
        candidates = [(group, readers) for group in self.graph.groups if (readers := self._readers(group))]
        if not candidates:
            return ()
        with torch.no_grad():
            self._trains = _trains(self.model, self.inputs, self.forward)
            try:
                self._watch = _Watch.of(self.model, self.inputs, self.forward)
            except Exception:  # noqa: BLE001 - it runs in double precision only
                return ()
            drafts: list[Block] = []
            for done, (group, readers) in enumerate(candidates):
                if self._late():
                    self.unsearched = len(candidates) - done
                    break
                draft = self._draft(group, readers)
                if draft is not None:
                    drafts.append(draft)
            sound = [block for team in _teams(drafts) for block in self._sound_ones(team)]
            return tuple(self._largest(_in_order(sound, self.graph), PRUNED))

    def _late(self) -> bool:
        return time.monotonic() > self.deadline

    def _sound_ones(self, team: list[Block]) -> list[Block]:
        """The blocks that may go: with broadcast constants, else with constants at full size."""
        first = self._largest(team)
        taken = {block.id for block in first}
        rest = [wide for block in team if block.id not in taken and (wide := _filled(block)) != block]
        return first + (self._largest(rest) if rest else [])

    def _largest(self, blocks: list[Block], others: float = 0.0) -> list[Block]:
        """As many of the blocks as can go together; `others` is the share of the other groups' channels that goes."""
        if not blocks or self._sound(blocks, others):
            return blocks
        if len(blocks) == 1:
            return []
        half = len(blocks) // 2
        found, right = self._largest(blocks[:half], others), self._largest(blocks[half:], others)
        if self._sound(found + right, others):
            return found + right
        for block in right:
            if self._sound([*found, block], others):
                found = [*found, block]
        return found

    def _sound(self, blocks: list[Block], others: float) -> bool:
        if not blocks:
            return True
        if self._late():
            self.unsearched += len(blocks)
            return False
        groups = {block.id for block in blocks}
        kept = {g.id: sample_kept(g, others) for g in self.graph.groups if others and g.id not in groups}
        readers = sorted({r for g in self.graph.groups if g.id in groups for r in self._readers(g)})
        try:
            return self._proved(blocks, kept) and self._watch.follows_without(readers)
        except Exception:  # noqa: BLE001 - a forward that fails without the groups needs them
            return False

    def _readers(self, group: Group) -> list[str]:
        """Layers that read the group, if it is all that runs through each of its tensors; else none."""
        covered: dict[tuple[str, int], int] = {}
        for member in group.members:
            key = member.param, member.dim
            covered[key] = covered.get(key, 0) + member.stride * group.width
        tensors = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        if any(tensors[param].shape[dim] != size for (param, dim), size in covered.items()):
            return []
        readers = sorted({member.param.rpartition(".")[0] for member in group.by_role("consumer")})
        makers = {producer.rpartition(".")[0] for producer in group.producers}
        sound = all(kind_of(self.model.get_submodule(name)) == "dense" and name not in makers for name in readers)
        return readers if sound else []

    def _draft(self, group: Group, readers: list[str]) -> Block | None:
        """What would go with a group; None where what its readers make is added to nothing."""
        if not any(self._is_added(reader, readers) for reader in readers):
            return None
        try:
            outline = self._watch.outline(readers)
        except Exception:  # noqa: BLE001 - a forward that fails without the group needs it
            return None
        if not outline.follows:
            return None
        live = [reader for reader in readers if reader not in outline.dead]
        if not live or not all(self._is_added(reader, live) for reader in live):
            return None
        return self._made(group, live, outline)

    def _is_added(self, reader: str, readers: list[str]) -> bool:
        """Whether other layers make the channels that a reader makes; what is in no group is left to the test."""
        made_by = [set(g.producers) for g in self.graph.groups if f"{reader}.weight" in g.producers]
        own = {f"{name}.weight" for name in readers}
        return all(makers - own for makers in made_by)

    def _made(self, group: Group, readers: list[str], outline: _Outline) -> Block:
        own = {m.param.rpartition(".")[0] for m in group.members if m.role != "consumer"}
        going = (outline.dead | own) & self._watch.called
        gone = {name for name in going if kind_of(self.model.get_submodule(name)) is not None}
        kind: SwapKind = "constant" if outline.broadcasts else "filled"
        swaps = [Swap(module=name, kind=kind) for name in readers]
        for norm, source in outline.folds.items():
            if norm not in gone and source in readers:
                swaps.append(Swap(module=norm, kind=kind, source=source))
        for name in gone:
            layer = self.model.get_submodule(name)
            swaps.append(Swap(module=name, kind="zeros" if isinstance(layer, LAYERS) else "pass"))
        lost = gone | set(readers)
        dead_groups = tuple(
            other.id
            for other in self.graph.groups
            if other.id != group.id
            and all(m.param.rpartition(".")[0] in gone for m in other.members if m.role == "producer")
            and all(m.param.rpartition(".")[0] in lost for m in other.members if m.role == "consumer")
        )
        return Block(id=group.id, swaps=tuple(sorted(swaps, key=lambda s: s.module)), dead=dead_groups)

    def _proved(self, blocks: Sequence[Block], kept: Mapping[str, Sequence[int]]) -> bool:
        """Whether surgery gives what the gates give, and the result trains where the dense model does."""
        graph = replace(self.graph, arch_sha256=architecture_sha256(self.model), blocks=tuple(blocks))
        plan = graph.plan({**kept, **{block.id: () for block in blocks}})
        pruned = apply_plan(copy.deepcopy(self.model), plan)
        try:
            got = self.forward(pruned, self.inputs)
        except Exception:  # noqa: BLE001 - the user's code wants another shape
            return False
        expected = self.forward(gate_model(self.model, plan), self.inputs)
        if len(got) != len(expected):
            return False
        if max((relative_gap(a, b) for a, b in zip(got, expected, strict=True)), default=0.0) > self.tolerance:
            return False
        return not self._trains or _trains(pruned, self.inputs, self.forward)


def _teams(blocks: Sequence[Block]) -> list[list[Block]]:
    """Blocks in teams whose members share no layer: a block inside another would hide behind it."""
    teams: list[tuple[list[Block], set[str]]] = []
    for block in blocks:
        layers = {swap.module for swap in block.swaps}
        for team, taken in teams:
            if not taken & layers:
                team.append(block)
                taken |= layers
                break
        else:
            teams.append(([block], layers))
    return [team for team, _ in teams]


def _filled(block: Block) -> Block:
    """The same with constants at full size."""
    swaps = (replace(swap, kind="filled") if swap.kind == "constant" else swap for swap in block.swaps)
    return replace(block, swaps=tuple(swaps))


def _in_order(blocks: Sequence[Block], graph: GroupGraph) -> list[Block]:
    place = {group.id: k for k, group in enumerate(graph.groups)}
    return sorted(blocks, key=lambda block: place[block.id])


@contextlib.contextmanager
def _precision(kind: torch.dtype) -> Iterator[None]:
    """The default type, which the user's code may make tensors of."""
    old = torch.get_default_dtype()
    torch.set_default_dtype(kind)
    try:
        yield
    finally:
        torch.set_default_dtype(old)


def _recorder(name: str, kind: str, seen: _Seen, calls: dict[str, int]):  # type: ignore[no-untyped-def]
    def hook(_module: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        seen.called.add(name)
        x = args[0] if args else named["input"]
        if kind != "norm" and x.is_floating_point():  # a norm hands its channels on: whoever reads them counts
            call = calls[name] = calls.get(name, -1) + 1
            seen.inputs[name, call] = x

    return hook


def _norm_recorder(name: str, made: dict[int, tuple[str, Tensor]], norms: dict[str, set[str]]):  # type: ignore[no-untyped-def]
    def hook(_module: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        x = args[0] if args else named["input"]
        norms.setdefault(name, set()).add(made[id(x)][0] if id(x) in made else "")

    return hook


def _constant(name: str, module: nn.Module, made: dict[int, tuple[str, Tensor]], narrow: bool):  # type: ignore[no-untyped-def]
    geometry = Geometry(module)
    weight, bias = module.get_parameter("weight"), module._parameters.get("bias")

    def forward(input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:  # noqa: A002 - as torch's
        shape = geometry(input.shape, output_size)
        if narrow:
            shape = tuple(n if k - len(shape) == geometry.axis else 1 for k, n in enumerate(shape))
        out = input.new_zeros(shape)
        level = weight.flatten()[0] * 0  # so that the layer counts as used where its constant is
        out = out + (level if bias is None else level + bias.view(-1, *(1 for _ in geometry.windows)))
        made[id(out)] = (name, out)
        return out

    return forward


def _mostly(wanted: Tensor, there: Tensor) -> bool:
    return float((wanted & there).sum()) >= VARYING * float(wanted.sum())


def _disturbed(name: str, value: Tensor) -> Tensor:
    """Other values for an input: noise of its own size, or the same whole numbers in other places."""
    if not value.is_floating_point():
        return value.roll(1, dims=-1) if value.ndim > 1 else value
    generator = torch.Generator().manual_seed(hash_seed(name))
    noise = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)
    size = value.std() if value.numel() > 1 else value.abs().mean()
    return value + noise * (size + 0.05)


def _trains(model: nn.Module, inputs: dict[str, Tensor], forward: Forward) -> bool:
    """Whether a copy runs in training mode and gives finite numbers."""
    try:
        outputs = forward(copy.deepcopy(model).train(), inputs)
    except Exception:  # noqa: BLE001 - the user's forward may raise anything
        return False
    return all(bool(torch.isfinite(o).all()) for o in outputs if o.is_floating_point())


__all__ = ["BlockSearch"]
