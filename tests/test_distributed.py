"""Processes that share a run: what they exchange, who speaks, and how the others end when one fails or is killed."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from typing import Any

import pytest
import torch
from torch import nn

from fusepress.pipeline import distributed
from fusepress.pipeline.errors import FusepressError, TaskError, UsageError
from tests.ranks import run_ranks, start_ranks


def exchange() -> dict[str, Any]:
    """Every primitive once, in one start of the processes."""
    me, world = distributed.rank(), distributed.world()
    mixed = [torch.full((2, 2), float(me + 1)), torch.full((3,), me + 1, dtype=torch.int64), torch.tensor(float(me))]
    distributed.all_reduce_(mixed)
    mean = [torch.tensor([float(me)])]
    distributed.all_reduce_(mean, "mean")
    layer = nn.Linear(2, 1)
    with torch.no_grad():
        layer.weight.fill_(me)
    distributed.broadcast_model_(layer, 1)
    some, all_of_us, none = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    all_of_us.grad = torch.full((2,), me + 1.0)
    if me == 1:
        some.grad = torch.ones(2)
    distributed.sum_gradients_([some, all_of_us, none])
    assert some.grad is not None
    mine = [number for number, _ in distributed.share("abcde")]
    with distributed.alone():
        inside = [distributed.rank(), distributed.world(), distributed.on_main(lambda: me)]
    distributed.barrier()
    return {
        "me": [me, world, distributed.is_main()],
        "sum": [value.tolist() for value in mixed],
        "mean": mean[0].tolist(),
        "weight": layer.weight.tolist(),
        "gradients": [some.grad.tolist(), all_of_us.grad.tolist(), none.grad],
        "gathered": distributed.gather_objects({"rank": me}),
        "told": distributed.broadcast_object(f"by {me}", 1),
        "on_main": distributed.on_main(lambda: [me, distributed.world()]),
        "mine": mine,
        "in_order": distributed.in_order(["abcde"[number] for number in mine]),
        "inside": inside,
    }


def test_tensors_and_objects_are_exchanged() -> None:
    found = run_ranks("tests.test_distributed:exchange")
    for me, one in enumerate(found):
        assert one.pop("me") == [me, 2, me == 0]
        assert one.pop("mine") == [[0, 2, 4], [1, 3]][me]
        assert one.pop("inside") == [0, 1, me]
    assert (
        found[0]
        == found[1]
        == {
            "sum": [[[3.0, 3.0], [3.0, 3.0]], [3, 3, 3], 1.0],
            "mean": [0.5],
            "weight": [[1.0, 1.0]],
            "gradients": [[1.0, 1.0], [3.0, 3.0], None],
            "gathered": [{"rank": 0}, {"rank": 1}],
            "told": "by 1",
            "on_main": [0, 1],
            "in_order": ["a", "b", "c", "d", "e"],
        }
    )


def test_a_single_process_exchanges_nothing() -> None:
    with distributed.session():
        assert (distributed.rank(), distributed.world(), distributed.is_main()) == (0, 1, True)
        value = torch.ones(2)
        distributed.all_reduce_([value])
        distributed.broadcast_([value])
        assert value.tolist() == [1, 1]
        assert distributed.gather_objects(3) == [3]
        assert distributed.on_main(lambda: 4) == 4
        assert list(distributed.share("ab")) == [(0, "a"), (1, "b")]
        assert distributed.in_order([1, 2]) == [1, 2]
        assert distributed.trouble() is None


@pytest.mark.parametrize("seconds", ["soon", "-1", "nan"])
def test_a_timeout_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, seconds: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("FUSEPRESS_DIST_TIMEOUT_S", seconds)
    with (
        pytest.raises(UsageError, match=r"expected a positive number of seconds; got .* at FUSEPRESS_DIST_TIMEOUT_S"),
        distributed.session(),
    ):
        pass


def test_half_a_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with (
        pytest.raises(UsageError, match=r"expected the variables of a launcher .* start with torchrun"),
        distributed.session(),
    ):
        pass


def ending(who: int, how: str, where: str) -> None:
    """One rank fails or is killed while the others are in a collective, or wait for rank 0; prints how it ended."""
    try:
        with distributed.session():
            distributed.barrier()
            if distributed.rank() == who and how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if distributed.rank() == who:
                raise TaskError("expected a; got b")
            if where == "turn":
                distributed.on_main(lambda: None)
            distributed.all_reduce_([torch.ones(1)])
    except FusepressError as error:
        sys.stdout.write(json.dumps([type(error).__name__, str(error)]) + "\n")
        sys.exit(error.exit_code)


@pytest.mark.parametrize(
    ("who", "how", "where", "code", "message"),
    [
        (
            1,
            "failed",
            "collective",
            2,
            r"expected all 2 processes to go on; got an error at rank 1: expected a; got b; .* run the same command",
        ),
        pytest.param(0, "failed", "turn", 2, r"got an error at rank 0: expected a; got b", marks=pytest.mark.long),
        (1, "killed", "collective", 5, r"no sign of life from rank 1: it was killed.*run the same command again"),
        pytest.param(
            0, "killed", "turn", 5, r"expected the other processes to answer; .* was lost", marks=pytest.mark.long
        ),
    ],
)
def test_when_one_rank_ends_the_other_ends_and_says_why(
    who: int, how: str, where: str, code: int, message: str
) -> None:
    script = f"from tests.test_distributed import ending; ending({who}, {how!r}, {where!r})"
    processes = start_ranks([["-c", script]] * 2)
    told = [process.communicate(timeout=60)[0] for process in processes]  # far below a collective's timeout
    kind, text = json.loads(told[1 - who].splitlines()[-1])
    assert kind == "RankError"
    assert re.search(message, text), text
    assert processes[1 - who].returncode == code
    assert processes[who].returncode == (-signal.SIGKILL if how == "killed" else 2)
