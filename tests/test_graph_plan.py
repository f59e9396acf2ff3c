"""The plan file: golden bytes, round trip, damage."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusepress.pipeline.errors import CheckpointError, StageError
from fusepress.pipeline.graph.plan import Frozen, Group, GroupGraph, Member, PlannedGroup, PrunePlan

GROUP = Group(
    id="a.weight",
    branch="camera",
    width=4,
    members=(
        Member(param="a.weight", dim=0),
        Member(param="bn.running_var", dim=0, role="norm"),
        Member(param="b.weight", dim=1, offset=8, stride=2, role="consumer"),
    ),
    producers=("a.weight",),
)
GRAPH = GroupGraph(groups=(GROUP,), frozen=(Frozen(module="head", reason="output"),), arch_sha256="ab" * 32)
GOLDEN = (
    '{"schema":1,"arch_sha256":"' + "ab" * 32 + '","groups":[{"id":"a.weight","branch":"camera","width":4,'
    '"kept":[0,2,3],"members":[{"param":"a.weight","dim":0,"offset":0,"stride":1,"role":"producer"},'
    '{"param":"bn.running_var","dim":0,"offset":0,"stride":1,"role":"norm"},'
    '{"param":"b.weight","dim":1,"offset":8,"stride":2,"role":"consumer"}]}],"removed_blocks":[]}'
)


def golden() -> dict[str, Any]:
    raw: dict[str, Any] = json.loads(GOLDEN)
    return raw


def test_the_json_is_what_outside_tools_read() -> None:
    plan = GRAPH.plan({"a.weight": [3, 0, 2]})
    assert json.dumps(json.loads(plan.to_json()), separators=(",", ":")) == GOLDEN
    assert PrunePlan.from_json(GOLDEN) == plan


def test_a_plan_without_roles_is_read_too() -> None:
    raw = golden()
    for member in raw["groups"][0]["members"]:
        del member["role"]
    assert PrunePlan.from_json(json.dumps(raw)).groups[0].kept == (0, 2, 3)


@given(st.integers(1, 40).flatmap(lambda w: st.tuples(st.just(w), st.sets(st.integers(0, w - 1), min_size=1))))
def test_round_trip(case: tuple[int, set[int]]) -> None:
    width, kept = case
    group = PlannedGroup(id="x", branch="b", width=width, kept=tuple(sorted(kept)), members=GROUP.members)
    plan = PrunePlan(arch_sha256="0", groups=(group,))
    assert PrunePlan.from_json(plan.to_json()) == plan
    assert sorted((*group.kept, *group.removed)) == list(range(width))


def test_groups_kept_whole_are_not_in_the_plan() -> None:
    assert GRAPH.plan({}).groups == ()
    assert GRAPH.plan({"a.weight": range(4)}).groups == ()


def test_members_name_their_indices() -> None:
    assert GROUP.members[2].indices([0, 3]) == [8, 9, 14, 15]


def damaged(**changes: Any) -> str:
    raw = golden()
    raw["groups"][0].update(changes)
    return json.dumps(raw)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "expected a prune plan in JSON"),
        ("[]", "expected a prune plan of schema 1; got 'list'"),
        ('{"schema": 2}', "expected a prune plan of schema 1; got 2"),
        ('{"schema": 1}', "expected `groups` \\(list\\)"),
        (damaged(kept=[2, 0]), "sorted and unique; .* at a.weight"),
        (damaged(kept=[0, 0]), "sorted and unique"),
        (damaged(kept=[0, 4]), "within 0..3; got 4 at a.weight"),
        (damaged(kept=[-1, 2]), "within 0..3; got -1"),
        (damaged(kept=[]), "at least one kept channel"),
        (damaged(kept=[0.5]), "expected channel numbers"),
        (damaged(kept=[True]), "expected channel numbers"),
        (damaged(width="4"), "expected `width` \\(int\\); got str"),
        (damaged(members=[{"param": "a", "dim": 0, "offset": 0}]), "expected `stride` \\(int\\)"),
        (damaged(members=[{"param": "a", "dim": -1, "offset": 0, "stride": 1}]), "expected dim >= 0"),
        (damaged(members=[{"param": "a", "dim": 0, "offset": 0, "stride": 1, "role": "?"}]), "expected a role of"),
        (
            GOLDEN.replace('"removed_blocks":[]', '"removed_blocks":["b"]'),
            "expected the removed block 'b' among the groups",
        ),
    ],
)
def test_damage_is_a_clear_error(text: str, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        PrunePlan.from_json(text)


def test_files_that_cannot_be_read_are_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"expected a prune plan file; got FileNotFoundError at .*plan\.json"):
        PrunePlan.read(tmp_path / "plan.json")
    (tmp_path / "plan.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match="expected a prune plan file; got UnicodeDecodeError"):
        PrunePlan.read(tmp_path / "plan.json")


def test_a_plan_of_unknown_groups_or_a_broken_multiple_is_refused() -> None:
    with pytest.raises(StageError, match="expected groups of this model; got 'zz'"):
        GRAPH.plan({"zz": [0]})
    paired = Group(id="p", branch="b", width=4, multiple=2, members=GROUP.members, producers=("p",))
    graph = GroupGraph(groups=(paired,), frozen=(), arch_sha256="0")
    with pytest.raises(StageError, match="expected a multiple of 2 kept channels; got 3 at p"):
        graph.plan({"p": [0, 1, 2]})
    with pytest.raises(StageError, match="equal numbers from each of the 2 parts"):
        graph.plan({"p": [0, 1]})


def test_plans_and_allocation_need_no_torch() -> None:
    code = (
        "import sys, fusepress.pipeline.graph.plan, fusepress.pipeline.graph.cost, fusepress.pipeline.pruning.allocate;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
