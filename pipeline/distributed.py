"""Several processes on one run: who they are, how they exchange tensors and objects, and what happens when one is lost.

Started by `torchrun --nproc-per-node=N -m fusepress compress RECIPE`. Every process ("rank") runs the same program; the
work over samples is shared, and rank 0 alone writes. In a single process, and outside of `session`, all functions here
do nothing and cost nothing: `world()` is 1.

* **Data** goes through collectives (gloo for CPU tensors, NCCL for those of a GPU). All ranks must call them in the
  same order. They give up after the timeout, or at once where a peer's connection breaks.
* **Turns**: what only one process may do (writing, building, timing) is done by `on_main`. The others wait for it, as
  long as rank 0 shows that it lives: they look at its heart-beat in the key-value store that torch's launcher keeps.
* **Failures**: a rank that fails says so in the store and breaks its connections, so that the others leave their
  collectives. They end with `RankError`, which names the rank and its error; a rank that says nothing and whose heart
  stands still was lost (killed, out of memory, network).
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from fusepress.pipeline.errors import RankError, StageError, UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

T = TypeVar("T")
Op = Literal["sum", "mean", "max"]

TIMEOUT_VARIABLE = "FUSEPRESS_DIST_TIMEOUT_S"
DEFAULT_TIMEOUT_S = 600.0
BEAT_S = 0.5
POLL_S = 0.02
WATCH_S = 4.0  # a heart that stands still that long, after something else went wrong, belongs to a lost rank
FAREWELL_S = 15.0  # rank 0 waits that long for the others to end, where they need its store
LINGER_S = 60.0  # a failed rank waits that long for rank 0 to note it: the launcher stops all as soon as one is gone
BUCKET = 2**25  # elements that are exchanged at once


@dataclass(slots=True)
class _Session:
    """What a process knows of its peers."""

    store: Any  # a torch.distributed.Store
    server: Any  # the store as it was opened: in rank 0 it may be what serves the others, as long as it is held
    rank: int
    world: int
    timeout_s: float
    turn: int = 0
    alone: int = 0
    lost: bool = False
    stop: threading.Event = field(default_factory=threading.Event)


_session: _Session | None = None  # a process has one, as it has one default process group


# ---------------------------------------------------------------------- who


def world() -> int:
    """Number of processes that share the work at this point; 1 in a single process, and inside `alone`."""
    return 1 if _session is None or _session.alone else _session.world


def rank() -> int:
    """Number of this process among them, from 0."""
    return 0 if _session is None or _session.alone else _session.rank


def is_main() -> bool:
    """Whether this is the process that writes and speaks: rank 0."""
    return _session is None or _session.rank == 0


def launched() -> int:
    """Number of processes that the launcher started (its environment variable WORLD_SIZE); 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def speaks() -> bool:
    """Whether the launcher made this process rank 0, or there is none: the one that talks to the user."""
    return launched() == 1 or os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Inside, this process works for itself: `world()` is 1 and nothing is exchanged."""
    if _session is None:
        yield
        return
    _session.alone += 1
    try:
        yield
    finally:
        _session.alone -= 1


@contextlib.contextmanager
def session(timeout_s: float | None = None) -> Iterator[None]:
    """Join the processes of the launcher; does nothing in a single process, and inside another session.

    Args:
        timeout_s: after which a collective, or a silent rank 0, is given up; default: the environment variable
            FUSEPRESS_DIST_TIMEOUT_S, else 600.

    Raises:
        UsageError: the launcher's variables are incomplete, or torch.distributed is in use already.
        RankError: (from the body too) another rank failed or was lost.
    """
    global _session
    if launched() == 1 or _session is not None:
        yield
        return
    _session = _join(_timeout(timeout_s))
    heart = threading.Thread(target=_beat, args=(_session,), daemon=True)
    heart.start()
    try:
        try:
            yield
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            _tell_failure(error)
            raise
        finally:
            _leave(_session)
    finally:
        _session = None


def _timeout(given: float | None) -> float:
    text = os.environ.get(TIMEOUT_VARIABLE, "") if given is None else str(given)
    try:
        seconds = float(text) if text else DEFAULT_TIMEOUT_S
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise UsageError(f"expected a positive number of seconds; got {text!r} at {TIMEOUT_VARIABLE}; set e.g. 600")
    return seconds


def _join(timeout_s: float) -> _Session:
    import torch
    import torch.distributed as dist

    if not dist.is_available():
        raise UsageError(
            "expected a torch with torch.distributed; got one without; install another build, or use a single process"
        )
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    if dist.is_initialized():
        raise UsageError(
            "expected to set up torch.distributed itself; got a process group at work already; start fusepress in its "
            "own processes (torchrun -m fusepress compress ...)"
        )
    try:
        shared, number, count = next(iter(rendezvous("env://", timeout=timedelta(seconds=timeout_s))))
    except (ValueError, RuntimeError) as error:
        raise UsageError(
            f"expected the variables of a launcher (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) and its store; got "
            f"{str(error).splitlines()[0]}; start with torchrun, or unset WORLD_SIZE for a single process"
        ) from error
    backend = "gloo"
    if torch.cuda.is_available():
        devices = torch.cuda.device_count()
        local = int(os.environ.get("LOCAL_RANK") or number)
        torch.cuda.set_device(local % devices)
        if dist.is_nccl_available() and int(os.environ.get("LOCAL_WORLD_SIZE") or count) <= devices:
            backend = "cpu:gloo,cuda:nccl"
    # torchrun restarts all ranks with the same store if it is told to: what an earlier attempt said must not count
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(
        backend,
        store=PrefixStore(f"torch/{attempt}", shared),
        rank=number,
        world_size=count,
        timeout=timedelta(seconds=timeout_s),
    )
    store = PrefixStore(f"fusepress/{attempt}", shared.clone())
    return _Session(store=store, server=shared, rank=number, world=count, timeout_s=timeout_s)


def _beat(own: _Session) -> None:
    """Shows that this process lives, from a thread, until it ends: also while the main thread computes."""
    with contextlib.suppress(RuntimeError):  # the store is gone: so is the run
        while not own.stop.wait(BEAT_S):
            own.store.add(f"beat/{own.rank}", 1)


# ----------------------------------------------------------------- exchange


def all_reduce_(tensors: Iterable[Tensor], op: Op = "sum") -> None:
    """Replace each tensor, in place, by the sum (mean, maximum) of the ranks' ones.

    The result is the same on every rank, bit for bit; it differs from a sum in one process by the order of additions.

    Args:
        tensors: of the same shapes, types and order on every rank.
        op: how they are combined; a mean divides by the number of ranks.

    Raises:
        RankError: a rank failed or was lost.
    """
    if world() == 1:
        return
    import torch
    import torch.distributed as dist

    how = dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM
    with torch.no_grad():
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.detach().reshape(-1) for tensor in bucket])
            _exchange(lambda flat=flat: dist.all_reduce(flat, op=how))  # type: ignore[misc]
            if op == "mean":
                flat /= world()
            _scatter(flat, bucket)


def broadcast_(tensors: Iterable[Tensor], source: int = 0) -> None:
    """Replace each tensor, in place, by that of the rank `source`.

    Args:
        tensors: of the same shapes, types and order on every rank.
        source: whose values hold.

    Raises:
        RankError: a rank failed or was lost.
    """
    if world() == 1:
        return
    import torch
    import torch.distributed as dist

    with torch.no_grad():
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.detach().reshape(-1) for tensor in bucket])
            _exchange(lambda flat=flat: dist.broadcast(flat, source))  # type: ignore[misc]
            _scatter(flat, bucket)


def broadcast_model_(model: nn.Module, source: int = 0) -> None:
    """Give every rank the parameters and buffers of the rank `source`, in place."""
    broadcast_([*model.parameters(), *model.buffers()], source)


def sum_gradients_(parameters: Iterable[nn.Parameter]) -> None:
    """Add up every parameter's gradient over the ranks, in place.

    A parameter that reached the loss on some ranks only counts as zero on the others; one that reached it on none keeps
    `grad is None`.

    Raises:
        RankError: a rank failed or was lost.
    """
    if world() == 1:
        return
    import torch

    every = list(parameters)
    reached = torch.tensor([parameter.grad is not None for parameter in every], dtype=torch.uint8)
    all_reduce_([reached], "max")
    chosen = [parameter for parameter, flag in zip(every, reached.tolist(), strict=True) if flag]
    for parameter in chosen:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    all_reduce_([parameter.grad for parameter in chosen if parameter.grad is not None])


def barrier() -> None:
    """Wait until every rank is here.

    Raises:
        RankError: a rank failed or was lost.
    """
    gather_objects(None)


def gather_objects(value: T) -> list[T]:
    """The values of all ranks, by rank, on every rank (pickled on the way: plain data, arrays).

    Raises:
        RankError: a rank failed or was lost.
    """
    if world() == 1:
        return [value]
    import torch.distributed as dist

    found: list[Any] = [None] * world()
    _exchange(lambda: dist.all_gather_object(found, value))
    return found


def broadcast_object(value: T, source: int = 0) -> T:
    """The value of the rank `source`, on every rank.

    Raises:
        RankError: a rank failed or was lost.
    """
    if world() == 1:
        return value
    import torch.distributed as dist

    held: list[Any] = [value if rank() == source else None]
    _exchange(lambda: dist.broadcast_object_list(held, source))
    found: T = held[0]
    return found


def on_main(call: Callable[[], T]) -> T:
    """What `call` returns, called by rank 0 alone; the others wait, however long it takes, while rank 0 lives.

    Raises:
        RankError: a rank failed or was lost.
        Exception: whatever `call` raises, on rank 0.
    """
    if world() > 1 and rank() != 0:
        heard: T = hear()
        return heard
    with alone():
        value = call()
    tell(value)
    return value


def tell(value: Any) -> None:
    """Hand a value from rank 0 to the others, who wait for it in `hear`; nothing happens in a single process.

    Raises:
        RankError: a rank failed or was lost.
    """
    if world() == 1 or _session is None:
        return
    _session.turn += 1
    sign = f"turn/{_session.turn}"
    _stored(lambda own: own.store.set(sign, "told"))
    broadcast_object(value)


def hear() -> Any:
    """What rank 0 tells next; the others wait for it, however long it takes, while rank 0 lives.

    Raises:
        RankError: a rank failed or was lost.
    """
    assert _session is not None, "only the ranks above 0 of a session have somebody to hear"
    _session.turn += 1
    _wait_for_main(_session, f"turn/{_session.turn}")
    return broadcast_object(None)


def share(items: Iterable[T]) -> Iterator[tuple[int, T]]:
    """This rank's items with their numbers: number i goes to rank i mod world."""
    yield from ((number, item) for number, item in enumerate(items) if number % world() == rank())


def in_order(own: Sequence[T]) -> list[T]:
    """Items that were shared out one by one (rank r has r, r + world, ...), in their first order, on every rank.

    Raises:
        StageError: their numbers show that they were not shared out so.
        RankError: a rank failed or was lost.
    """
    parts = gather_objects(list(own))
    lengths = [len(part) for part in parts]
    if any(lengths[r] != (sum(lengths) - r + len(parts) - 1) // len(parts) for r in range(len(parts))):
        raise StageError(
            f"expected items that were dealt out to {len(parts)} ranks in turn; got {lengths} of them; "
            "batches(split, seed, rank=r, world=w) must yield every w-th batch, from number r on"
        )
    return [parts[number % len(parts)][number // len(parts)] for number in range(sum(lengths))]


def in_turn(
    make: Callable[[int], Sequence[Tensor | None]], like: Sequence[Tensor], own: int, count: int
) -> Iterator[Sequence[Tensor | None]]:
    """What the ranks make of the items that were shared out, item by item in their first order, on every rank.

    A sum over what is yielded is that of one process, bit for bit, which `all_reduce_` does not promise; it costs one
    exchange an item.

    Args:
        make: called with 0 to own - 1, each once; gives tensors (or None) as `like` has, which it does not use again.
        like: of their shapes, types and devices.
        own: items of this rank.
        count: items of all ranks.

    Yields:
        The tensors of items 0 to count - 1; the caller may keep and change them.

    Raises:
        RankError: a rank failed or was lost.
    """
    import torch

    for first in range(0, count, world()):
        index = first // world()
        mine = make(index) if index < own else None
        for source in range(min(world(), count - first)):
            if world() == 1:
                assert mine is not None
                yield mine
                continue
            here = mine if source == rank() else None
            there = torch.tensor([here is not None and tensor is not None for tensor in here or like])
            broadcast_([there], source)
            given = here or [None] * len(like)
            got = [
                (torch.empty_like(pattern) if tensor is None else tensor) if flag else None
                for flag, pattern, tensor in zip(there.tolist(), like, given, strict=True)
            ]
            broadcast_([tensor for tensor in got if tensor is not None], source)
            yield got


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one type and device, up to BUCKET elements together."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        fits = not bucket or (
            (tensor.dtype, tensor.device) == (bucket[0].dtype, bucket[0].device)
            and sum(held.numel() for held in bucket) + tensor.numel() <= BUCKET
        )
        if not fits:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def _scatter(flat: Tensor, bucket: Sequence[Tensor]) -> None:
    for part, tensor in zip(flat.split([tensor.numel() for tensor in bucket]), bucket, strict=True):
        tensor.copy_(part.view(tensor.shape))


def _exchange(call: Callable[[], Any]) -> None:
    """A collective; where it breaks, the reason is that of the rank that broke it."""
    try:
        call()
    except (RuntimeError, OSError) as error:
        raise (trouble() or _unknown(error)) from error


# ----------------------------------------------------------------- failures


def trouble() -> RankError | None:
    """What went wrong on another rank, if anything did: it failed, or it was lost. Looks on for a few seconds."""
    own = _session
    if own is None:
        return None
    try:
        hearts = _hearts(own)
        until = time.monotonic() + WATCH_S
        while time.monotonic() < until:
            failure = _failure(own)
            if failure is not None:
                return failure
            time.sleep(POLL_S)
        still = [r for r, beats in _hearts(own).items() if beats == hearts[r]]
    except RuntimeError as error:  # the store is gone, and with it whoever kept it
        return _unknown(error)
    own.lost = bool(still)
    return _lost(own, still) if still else None


def _hearts(own: _Session) -> dict[int, int]:
    """Beats so far of the other ranks, without those that took their leave."""
    others = (r for r in range(own.world) if r != own.rank)
    return {r: own.store.add(f"beat/{r}", 0) for r in others if not own.store.check([f"bye/{r}"])}


def _failure(own: _Session) -> RankError | None:
    if not own.store.check(["failed"]):
        return None
    told = json.loads(own.store.get("failed"))
    if told["rank"] == own.rank:
        return None
    return RankError(
        f"expected all {own.world} processes to go on; got an error at rank {told['rank']}: {told['message']}; what "
        "was finished is kept: mend it and run the same command again",
        exit_code=told["exit_code"],
        details=told["details"],
    )


def _lost(own: _Session, ranks: Sequence[int]) -> RankError:
    names = ", ".join(map(str, ranks))
    return RankError(
        f"expected all {own.world} processes to go on; got no sign of life from rank {names}: it was killed, ran out "
        "of memory or lost its connection; what was finished is kept: run the same command again",
        lost=True,
    )


def _unknown(error: BaseException) -> RankError:
    text = (str(error).splitlines() or [type(error).__name__])[0]
    return RankError(
        f"expected the other processes to answer; got {text}; one of them was lost, or was busy for longer than "
        f"{TIMEOUT_VARIABLE} allows; what was finished is kept: run the same command again",
        lost=True,
    )


def _tell_failure(error: BaseException) -> None:
    """The first failure counts; those that follow from it are not told."""
    if isinstance(error, RankError):
        return
    own = _session
    assert own is not None
    code = getattr(error, "exit_code", StageError.exit_code)
    message = str(error) if hasattr(error, "exit_code") else f"{type(error).__name__}: {error}"
    details = "" if isinstance(error, UsageError) else "".join(traceback.format_exception(error))
    told = json.dumps({"rank": own.rank, "message": message, "exit_code": code, "details": details})
    with contextlib.suppress(RuntimeError):
        own.store.compare_set("failed", "", told)


def _leave(own: _Session) -> None:
    """Break the connections, which frees peers from their collectives, and wait for those that need this process."""
    import torch.distributed as dist

    failed = False
    with contextlib.suppress(RuntimeError):
        failed = own.store.check(["failed"])
        own.store.set(f"bye/{own.rank}", "bye")
    with contextlib.suppress(RuntimeError, ValueError):
        dist.destroy_process_group()
    with contextlib.suppress(RuntimeError):
        if own.rank == 0 and not own.lost and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            # without torchrun it keeps the store in which the others read how it ended
            _wait([f"bye/{r}" for r in range(1, own.world)], own, FAREWELL_S)
        elif own.rank and failed:
            # rank 0 writes down what happened and tells the user; the launcher would stop it when this process ends
            _wait(["bye/0"], own, LINGER_S)
            time.sleep(2 * BEAT_S)
    own.stop.set()


def _wait(keys: list[str], own: _Session, seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and not own.store.check(keys):
        time.sleep(POLL_S)


def _wait_for_main(own: _Session, sign: str) -> None:
    """Wait for a sign of rank 0, which may be at work for hours, as long as its heart beats."""
    beats, seen = -1, time.monotonic()
    looked = 0.0

    def look(_own: _Session) -> bool:
        nonlocal beats, seen, looked
        if own.store.check([sign]):
            return True
        if time.monotonic() - looked < BEAT_S:
            return False
        looked = time.monotonic()
        failure = _failure(own)
        if failure is not None:
            raise failure
        now = own.store.add("beat/0", 0)
        if now != beats:
            beats, seen = now, time.monotonic()
        if own.store.check(["bye/0"]):
            raise RankError("expected rank 0 to go on; got its leave, for it was stopped; run the same command again")
        if time.monotonic() - seen > own.timeout_s:
            raise _lost(own, [0])
        return False

    while not _stored(look):
        time.sleep(POLL_S)


def _stored(call: Callable[[_Session], T]) -> T:
    """An access to the store; where it breaks, whoever kept it is lost."""
    assert _session is not None
    try:
        return call(_session)
    except RuntimeError as error:
        raise _unknown(error) from error
