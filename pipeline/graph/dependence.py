"""Coupled channels found by numbers: disturb a channel where it is made, and see where it arrives.

No tracer: the user's forward runs as it is, on a copy in which every dense layer returns a fixed tensor instead of
computing, so that a disturbance reaches only the layers that read it directly. Which channel an input index
depends on is read off a binary code: channel c is disturbed in run b when bit b of c is set, and in the mirrored run
when it is not. An index that answers to both depends on several channels, which are then told apart one by one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fusepress.pipeline.errors import TraceError
from fusepress.pipeline.graph.ports import Kind, Links, Port, Slot, channel_dim, kind_of, layer_ports, tensor_ports

MAX_SOURCES = 16  # channels that may merge into one index (pixel shuffle by 4); more is mixing
MAX_SINGLE = 4096  # channels that are told apart one by one
OUT_OF_TIME = "out of time"
MIXED = "an operation outside the standard layers mixes its channels"

Forward = Callable[[nn.Module, dict[str, Tensor]], list[Tensor]]


@dataclass(slots=True)
class Bench:
    """A copy of the model whose dense layers return fixed tensors, with one disturbed source at a time."""

    model: nn.Module
    inputs: dict[str, Tensor]
    forward: Forward
    deadline: float
    kinds: dict[str, Kind] = field(default_factory=dict)
    ports: dict[str, Port] = field(default_factory=dict)
    loose: dict[str, Tensor] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)
    watched: set[str] | None = None
    seen: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    changed: dict[str, Tensor] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    shapes: dict[tuple[str, tuple[int, ...]], tuple[int, ...]] = field(default_factory=dict)
    noise: dict[tuple[str, int, tuple[int, ...]], tuple[Tensor, Tensor]] = field(default_factory=dict)
    outputs: list[Tensor] = field(default_factory=list)
    recording: bool = True

    def run(self) -> bool:
        """One forward pass; returns whether the model's outputs changed against the recorded pass."""
        if time.monotonic() > self.deadline:
            raise TraceError(OUT_OF_TIME)
        self.calls.clear()
        self.changed = {
            name: torch.zeros(port.size, dtype=torch.bool)
            for name, port in self.ports.items()
            if not name.startswith(("out:", "tensor:"))
        }
        torch.manual_seed(0)
        outputs = self.forward(self.model, self.inputs)
        if self.recording:
            self.outputs = outputs
            return False
        return len(outputs) != len(self.outputs) or any(
            _differs(a, b) for a, b in zip(outputs, self.outputs, strict=False)
        )

    def observe(self, port: str, module: nn.Module, x: Tensor, call: int) -> None:
        """Compare a layer's input with the recorded one, channel by channel."""
        if self.recording:
            self.seen[port, call] = x
            return
        if self.watched is not None and port not in self.watched:
            return
        base = self.seen.get((port, call))
        if base is None or base.shape != x.shape:
            raise TraceError("its size depends on the values")
        dim = channel_dim(module, x)
        if x.shape[dim] != self.ports[port].size:
            raise TraceError("an input of unexpected size")
        if torch.equal(x, base):
            return
        different = (x != base) & ~(x.isnan() & base.isnan())
        over = [d for d in range(x.ndim) if d != dim]
        hit = different.any(dim=over) if over else different
        self.changed[port] |= hit.cpu()

    def fixed(self, name: str, call: int, shape: tuple[int, ...], like: Tensor, dim: int) -> Tensor:
        """What a dense layer returns: fixed positive noise, raised in the disturbed channels."""
        key = (name, call, shape)
        if key not in self.noise:
            generator = torch.Generator().manual_seed(hash_seed(f"{name}/{call}"))
            draw = [torch.rand(shape, generator=generator, dtype=torch.float64) for _ in range(2)]
            # positive and below one, raised by more than a half: passes ReLU, clamps and maxima
            self.noise[key] = ((0.2 + 0.7 * draw[0]).to(like), (0.5 + draw[1]).to(like))
        base, raised = self.noise[key]
        mask = self.masks.get(f"out:{name}")
        if mask is None:
            return base.clone()
        view = [1] * len(shape)
        view[dim] = -1
        return base + raised * mask.to(like).view(view)


def hash_seed(text: str) -> int:
    """A seed that does not depend on the process (unlike hash())."""
    import zlib

    return zlib.crc32(text.encode())


def _differs(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return True
    return bool(((a != b) & ~(a.isnan() & b.isnan())).any()) if a.is_floating_point() else bool((a != b).any())


def set_up(model: nn.Module, inputs: dict[str, Tensor], forward: Forward, deadline: float) -> Bench:
    """List the ports of `model`, which must be a private copy in evaluation mode."""
    bench = Bench(model=model, inputs=inputs, forward=forward, deadline=deadline)
    used = _called(model, inputs, forward)
    shared = _shared_tensors(model)
    for name, module in model.named_modules():
        kind = kind_of(module)
        if kind is None or name not in used:
            continue
        bench.kinds[name] = kind
        for port in layer_ports(name, module, kind):
            if any(axis.param in shared for axis in port.axes):
                port.frozen = f"{name} shares its weights with another layer"
            bench.ports[port.name] = port
    owned = {axis.param for port in bench.ports.values() for axis in port.axes}
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in held.items():
        if name not in owned and name not in shared and tensor.is_floating_point():
            for port in tensor_ports(name, tensor):
                bench.ports[port.name] = port
                bench.loose[port.name] = tensor
    return bench


def start(bench: Bench) -> None:
    """Replace the layers' forwards and record the undisturbed pass.

    Raises:
        TraceError: the forward pass is not repeatable.
    """
    model = bench.model
    owned = {axis.param for port in bench.ports.values() if port.name not in bench.loose for axis in port.axes}
    _prepare_tensors(bench, {name for name, _ in model.named_parameters()} - owned)
    for name, kind in bench.kinds.items():
        module = model.get_submodule(name)
        module.forward = _replacement(bench, name, module, kind)
    bench.run()
    bench.recording = False
    if bench.run() or any(bool(hit.any()) for hit in bench.changed.values()):
        raise TraceError("two passes over the same input differ")


def _called(model: nn.Module, inputs: dict[str, Tensor], forward: Forward) -> set[str]:
    used: set[str] = set()
    hooks = [
        module.register_forward_hook(lambda _m, _i, _o, name=name: used.add(name))
        for name, module in model.named_modules()
    ]
    try:
        forward(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return used


def _shared_tensors(model: nn.Module) -> set[str]:
    """Names of parameters that two different modules hold (tied weights)."""
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(f"{path}.{key}" if path else key)
    return {name for names in owners.values() if len(names) > 1 for name in names}


def _prepare_tensors(bench: Bench, loose_parameters: set[str]) -> None:
    """Make what lies between the dense layers let every channel through: no zero scales, no dead filters."""
    with torch.no_grad():
        for name, kind in bench.kinds.items():
            module = bench.model.get_submodule(name)
            if kind == "depthwise":
                weight, bias = module._parameters["weight"], module._parameters.get("bias")
                assert weight is not None
                weight.fill_(1.0 / weight[0].numel())
                if bias is not None:
                    bias.zero_()
        for name, parameter in bench.model.named_parameters():
            if name in loose_parameters and parameter.is_floating_point():
                generator = torch.Generator().manual_seed(hash_seed(name))
                parameter.copy_(0.2 + 0.7 * torch.rand(parameter.shape, generator=generator, dtype=torch.float64))


def _replacement(bench: Bench, name: str, module: nn.Module, kind: Kind) -> Callable[..., Any]:
    real = module.forward
    port = f"norm:{name}" if kind in ("norm", "depthwise") else f"in:{name}"

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        x: Tensor = args[0] if args else kwargs["input"]
        call = bench.calls.get(name, 0)
        bench.calls[name] = call + 1
        if kind != "embedding":
            bench.observe(port, module, x, call)
        if kind == "norm":
            return x.clone()
        if kind == "depthwise":
            out: Tensor = real(*args, **kwargs)
            return out
        key = (name, tuple(x.shape))
        if key not in bench.shapes:
            bench.shapes[key] = tuple(real(*args, **kwargs).shape)
        shape = bench.shapes[key]
        like = x if x.is_floating_point() else next(module.parameters())
        return bench.fixed(name, call, shape, like, _out_dim(module, shape))

    return forward


def _out_dim(module: nn.Module, shape: tuple[int, ...]) -> int:
    return channel_dim(module, torch.empty(shape, device="meta"))


Reach = dict[str, Tensor]  # port name -> which of its indices answer


def find_links(bench: Bench) -> Links:
    """Disturb every source of channels and link each channel with the indices that answer to it.

    Sources that reach different ports are disturbed in the same runs.
    """
    links = Links()
    for port in bench.ports.values():
        if port.frozen is not None:
            links.freeze_port(port, port.frozen)
    sources = [port for port in bench.ports.values() if port.name.startswith("out:")]
    reaches: dict[str, Reach] = {}
    for port in sources:
        for index in range(port.size):
            links.root((port.name, index))
        reach = _guarded(links, port, lambda port=port: _first_reach(bench, links, port))  # type: ignore[misc]
        if reach:
            reaches[port.name] = reach
    for team in _teams([port for port in sources if port.name in reaches], reaches):
        _link_team(bench, links, team, reaches)
    for port in bench.ports.values():
        if port.name in bench.loose:
            _guarded(links, port, lambda port=port: _link_loose(bench, links, port))  # type: ignore[misc]
    return links


def _guarded(links: Links, port: Port, work: Callable[[], Reach | None]) -> Reach | None:
    """Run a disturbed pass; a forward that fails or changes its sizes freezes the source."""
    try:
        return work()
    except TraceError as error:
        if str(error) == OUT_OF_TIME:
            raise
        why = f"what reads it could not be followed: {error}"
    except Exception as error:  # noqa: BLE001 - the user's forward may raise anything when disturbed
        why = f"its forward failed when disturbed: {type(error).__name__}"
    if port.role == "producer":
        links.freeze_port(port, why)
    return None


def _disturb(bench: Bench, masks: dict[str, Tensor], watched: set[str] | None = None) -> tuple[Reach, bool]:
    """Disturb some channels of some sources; returns which input indices changed, and whether the outputs did."""
    bench.watched = watched
    kept: dict[str, Tensor] = {}
    bench.masks = masks
    try:
        with torch.no_grad():
            for name in masks.keys() & bench.loose.keys():
                tensor = bench.loose[name]
                kept[name] = tensor.detach().clone()
                view = [1] * tensor.ndim
                view[bench.ports[name].axes[0].dim] = -1
                generator = torch.Generator().manual_seed(hash_seed(name))
                raised = 0.5 + torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
                tensor.add_(raised.to(tensor) * masks[name].to(tensor).view(view))
        out = bench.run()
    finally:
        bench.masks, bench.watched = {}, None
        with torch.no_grad():
            for name, old in kept.items():
                bench.loose[name].copy_(old)
    return bench.changed, out


def _first_reach(bench: Bench, links: Links, port: Port) -> Reach:
    changed, out = _disturb(bench, {port.name: torch.ones(port.size, dtype=torch.bool)})
    reach = {name: hit for name, hit in changed.items() if bool(hit.any())}
    if out:
        links.freeze_port(port, "its channels are the model's output")
    elif not reach:
        links.freeze_port(port, "nothing reads its output")
    return reach


def _teams(sources: list[Port], reaches: dict[str, Reach]) -> list[list[Port]]:
    """Sources packed into teams within which no port is reached twice."""
    teams: list[tuple[list[Port], set[str]]] = []
    for port in sources:
        ports = set(reaches[port.name])
        for team, taken in teams:
            if not taken & ports:
                team.append(port)
                taken |= ports
                break
        else:
            teams.append(([port], ports))
    return [team for team, _ in teams]


def _link_team(bench: Bench, links: Links, team: list[Port], reaches: dict[str, Reach]) -> None:
    try:
        found = _decode(bench, team, reaches)
    except Exception as error:
        if str(error) == OUT_OF_TIME:
            raise
        if len(team) > 1:
            for port in team:
                _link_team(bench, links, [port], reaches)
            return
        links.freeze_port(team[0], f"what reads it could not be followed: {error}")
        return
    for port in team:
        where, several = found[port.name]
        for slot, channel in where.items():
            links.join((port.name, channel), slot)
        if several:
            _guarded(links, port, lambda p=port, s=several: _link_several(bench, links, p, s))  # type: ignore[misc]


def _decode(bench: Bench, team: list[Port], reaches: dict[str, Reach]) -> dict[str, tuple[dict[Slot, int], set[Slot]]]:
    """Per source: the channel of every reached index by its binary code; indices that answer to several apart."""
    bits = max(max(1, (port.size - 1).bit_length()) for port in team)
    codes = {
        port.name: {n: torch.zeros(h.shape, dtype=torch.long) for n, h in reaches[port.name].items()} for port in team
    }
    watched = {name for port in team for name in reaches[port.name]}
    unclear = {port.name: {n: torch.zeros_like(h) for n, h in reaches[port.name].items()} for port in team}
    for bit in range(bits):
        on = {port.name: (torch.arange(port.size) >> bit) & 1 == 1 for port in team}
        ones, _ = _disturb(bench, on, watched)
        zeros, _ = _disturb(bench, {name: ~mask for name, mask in on.items()}, watched)
        for source, reach in codes.items():
            for name, code in reach.items():
                code += ones[name].long() << bit
                unclear[source][name] |= ones[name] == zeros[name]
    found = {}
    for port in team:
        where: dict[Slot, int] = {}
        several: set[Slot] = set()
        for name, hit in reaches[port.name].items():
            for index in hit.nonzero().flatten().tolist():
                channel = int(codes[port.name][name][index])
                if bool(unclear[port.name][name][index]) or channel >= port.size:
                    several.add((name, index))
                else:
                    where[name, index] = channel
        found[port.name] = (where, several)
    return found


def _link_several(bench: Bench, links: Links, port: Port, several: set[Slot]) -> None:
    if port.size > MAX_SINGLE:
        links.freeze_port(port, MIXED)
        return
    sources: dict[Slot, list[int]] = {slot: [] for slot in several}
    names = {name for name, _ in several}
    for channel in range(port.size):
        one = torch.zeros(port.size, dtype=torch.bool)
        one[channel] = True
        changed, _ = _disturb(bench, {port.name: one}, names)
        for name in names:
            for index in changed[name].nonzero().flatten().tolist():
                if (name, index) in sources:
                    sources[name, index].append(channel)
    for (name, _), channels in sorted(sources.items()):
        if not channels or len(channels) > MAX_SOURCES or (len(channels) == port.size and port.size > 2):
            links.freeze_port(port, f"{MIXED} on the way to {bench.ports[name].module}")
            return
    for slot, channels in sorted(sources.items()):
        for channel in channels:
            links.join((port.name, channel), slot)


def _link_loose(bench: Bench, links: Links, port: Port) -> None:
    """Link a tensor of no standard layer where one of its axes scales or shifts the channels one by one.

    An axis that several channels of the layers answer to (a grid, a time step, a custom convolution's input) is none.
    """
    if port.size > MAX_SINGLE:
        return
    changed, _ = _disturb(bench, {port.name: torch.ones(port.size, dtype=torch.bool)})
    reach = {name: hit for name, hit in changed.items() if bool(hit.any())}
    if not reach:
        return
    first, _ = _disturb(bench, {port.name: torch.arange(port.size) == 0}, set(reach))
    if all(torch.equal(first[name], hit) for name, hit in reach.items()):
        return  # one index reaches all channels
    where, several = _decode(bench, [port], {port.name: reach})[port.name]
    made = {links.root(slot) for slot in list(links._parent) if slot[0].startswith("out:")}
    touched: dict[int, set[Slot]] = {}
    for slot, channel in where.items():
        touched.setdefault(channel, set()).update({links.root(slot)} & made)
    if several or any(len(roots) > 1 for roots in touched.values()):
        return
    for slot, channel in where.items():
        links.join((port.name, channel), slot)
