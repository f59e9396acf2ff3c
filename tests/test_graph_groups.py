"""Coupled channel groups: what is found, what is frozen and why, and that pruned equals gated."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from fusepress.pipeline.errors import TaskError, TraceError
from fusepress.pipeline.graph.apply import apply_plan, gate_model
from fusepress.pipeline.graph.check import relative_gap, sample_kept
from fusepress.pipeline.graph.cost import CostModel
from fusepress.pipeline.graph.groups import find_groups, run_flat, run_within
from fusepress.pipeline.graph.plan import Group, GroupGraph
from fusepress.pipeline.pruning.ladders import ladder_widths
from fusepress.pipeline.recipe import PruneConfig
from tests import graph_models as zoo

BRANCHES = {"camera": ["camera", "eye", "second"], "lidar": ["lidar", "range"]}
Case = tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]]]


def plain() -> dict[str, Tensor]:
    return {"x": zoo.image()}


CASES: dict[str, Case] = {
    "residual": (zoo.Residual, plain),
    "concat": (zoo.Concat, plain),
    "flatten": (zoo.Flatten, plain),
    "depthwise": (zoo.Depthwise, plain),
    "decoder": (zoo.Decoder, plain),
    "convnext": (zoo.ConvNext, plain),
    "groupnorm": (zoo.GroupNormed, plain),
    "glu": (zoo.Gated, plain),
    "attention": (zoo.Attention, lambda: {"x": zoo.image(channels=12)}),
    "attention heads": (zoo.MultiHead, lambda: {"x": zoo.image(channels=12)}),
    "pillars": (zoo.PillarNet, zoo.pillar_inputs),
    "stranger, shared backbone": (lambda: zoo.Stranger(shared=True), zoo.stranger_inputs),
    "stranger, two backbones": (lambda: zoo.Stranger(shared=False), zoo.stranger_inputs),
    "called twice": (zoo.Twice, plain),
}
# producers of every group, with widths
EXPECTED: dict[str, dict[str, int]] = {
    "residual": {"b.weight+stem.0.weight": 16, "a.0.weight": 24},
    "concat": {"a.0.weight": 8, "b.0.weight": 16, "mix.0.weight": 16},
    "flatten": {"a.0.weight": 8, "first.weight+last.weight": 12},
    "depthwise": {"se.up.weight+stem.weight": 16, "se.down.weight": 8, "pw.0.weight": 16},
    "decoder": {"a.0.weight": 16, "up.weight": 12, "wide.weight": 8},
    "convnext": {
        "blocks.0.down.weight+blocks.1.down.weight+stem.weight": 16,
        "blocks.0.up.weight": 32,
        "blocks.1.up.weight": 32,
    },
    "groupnorm": {"a.weight": 16},
    "glu": {"a.weight": 8},
    "attention": {"v.weight": 8},
    "attention heads": {"k.weight+q.weight+v.weight": 4},
    "pillars": {
        "camera.0.0.weight": 16,
        "camera.1.0.weight": 16,
        "lidar.point.weight": 16,
        "lidar.bev.0.weight": 24,
        "fuse.0.weight": 16,
    },
    "stranger, shared backbone": {
        "eye.0.0.weight": 16,
        "eye.2.0.weight": 16,
        "range.0.0.weight+range.1.up.weight": 12,
        "range.1.down.weight": 8,
        "range.2.0.weight": 16,
        "fuse.0.weight": 24,
    },
    "stranger, two backbones": {
        "eye.0.0.weight": 16,
        "eye.2.0.weight": 16,
        "second.0.0.weight": 16,
        "second.1.0.weight": 16,
        "range.0.0.weight+range.1.up.weight": 12,
        "range.1.down.weight": 8,
        "range.2.0.weight": 16,
        "fuse.0.weight": 24,
    },
    "called twice": {"loop.0.weight+stem.0.weight": 16},
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are tiny
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def build(name: str) -> tuple[nn.Module, dict[str, Tensor], GroupGraph]:
    make, inputs = CASES[name]
    model, example = zoo.settled(make()), inputs()
    return model, example, find_groups(model, example, BRANCHES)


def by_param(group: Group, param: str) -> set[tuple[int, int, int]]:
    return {(m.dim, m.offset, m.stride) for m in group.members if m.param == param}


@pytest.mark.parametrize("name", CASES)
def test_finds_every_group_and_the_pruned_model_equals_the_gated_one(name: str) -> None:
    model, inputs, graph = build(name)
    assert graph.widths == EXPECTED[name]
    for share in (0.2, 0.6):  # other channels than the finder's own test removes
        kept = {group.id: sample_kept(group, share) for group in graph.groups}
        plan = graph.plan(kept)
        double = copy.deepcopy(model).double()
        values = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
        torch.set_default_dtype(torch.float64)
        try:
            expected = run_flat(gate_model(double, plan), values)
            got = run_flat(apply_plan(double, plan), values)
            dense = run_flat(copy.deepcopy(model).double(), values)
        finally:
            torch.set_default_dtype(torch.float32)
        assert max(relative_gap(a, b) for a, b in zip(got, expected, strict=True)) < 1e-5
        assert max(relative_gap(a, b) for a, b in zip(got, dense, strict=True)) > 1e-5  # and it is not the dense model


@pytest.mark.parametrize("name", ["residual", "pillars", "stranger, shared backbone"])
def test_leaves_the_model_and_the_global_state_as_they_were(name: str) -> None:
    make, inputs = CASES[name]
    model, example = zoo.settled(make()), inputs()
    model.train()
    next(model.children()).eval()
    next(iter(model.parameters())).grad = torch.ones_like(next(iter(model.parameters())))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    grads = [parameter.grad is not None for parameter in model.parameters()]
    wants = [parameter.requires_grad for parameter in model.parameters()]
    rng = torch.get_rng_state()
    find_groups(model, example, BRANCHES)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert [parameter.grad is not None for parameter in model.parameters()] == grads
    assert [parameter.requires_grad for parameter in model.parameters()] == wants
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()


def test_is_deterministic() -> None:
    first, second = build("stranger, two backbones")[2], build("stranger, two backbones")[2]
    assert first == second


def test_concatenation_shifts_the_consumer_by_an_offset() -> None:
    graph = build("concat")[2]
    assert by_param(graph["a.0.weight"], "mix.0.weight") == {(1, 0, 1)}
    assert by_param(graph["b.0.weight"], "mix.0.weight") == {(1, 8, 1)}


def test_flattening_gives_a_stride_or_one_member_a_position() -> None:
    group = build("flatten")[2]["a.0.weight"]
    assert by_param(group, "first.weight") == {(1, 0, 16)}
    assert by_param(group, "last.weight") == {(1, 8 * k, 1) for k in range(16)}


def test_transposed_convolutions_swap_their_dimensions() -> None:
    graph = build("decoder")[2]
    assert by_param(graph["a.0.weight"], "up.weight") == {(0, 0, 1)}
    assert by_param(graph["up.weight"], "up.weight") == {(1, 0, 1)}
    assert by_param(graph["up.weight"], "dw.weight") == {(0, 0, 1)}
    assert by_param(graph["wide.weight"], "wide.weight") == {(0, 0, 4)}


def test_a_depthwise_multiplier_and_a_gated_unit_are_strides_and_offsets() -> None:
    depthwise = build("depthwise")[2]["se.up.weight+stem.weight"]
    assert by_param(depthwise, "dw.weight") == {(0, 0, 2)}
    assert by_param(depthwise, "pw.0.weight") == {(1, 0, 2)}
    assert by_param(depthwise, "act.weight") == {(0, 0, 1)}
    assert by_param(build("glu")[2]["a.weight"], "a.weight") == {(0, 0, 1), (0, 8, 1)}


def test_an_attention_head_is_one_channel_of_its_group_and_spans_its_size() -> None:
    heads = build("attention heads")[2]["k.weight+q.weight+v.weight"]
    for layer in "qkv":
        assert by_param(heads, f"{layer}.weight") == by_param(heads, f"{layer}.bias") == {(0, 0, 4)}
    assert by_param(heads, "out.weight") == {(1, 0, 4)}
    assert heads.span == 4
    assert ladder_widths(heads, PruneConfig(macs=0.5), 8, []) == (4, 2)  # two heads are eight channels
    assert ladder_widths(heads, PruneConfig(macs=0.5, min_channels=4), 4, []) == (4, 3, 2, 1)


@pytest.mark.parametrize("name", ["depthwise", "decoder", "flatten", "glu"])
def test_other_strides_span_one_channel_of_the_narrowest_layer(name: str) -> None:
    assert {group.span for group in build(name)[2].groups} == {1}


def test_batch_norm_buffers_layer_scales_and_norms_are_members() -> None:
    residual = build("residual")[2]["b.weight+stem.0.weight"]
    assert {m.param for m in residual.by_role("norm")} >= {"bn.running_mean", "bn.running_var", "stem.1.weight"}
    stream = build("convnext")[2]["blocks.0.down.weight+blocks.1.down.weight+stem.weight"]
    assert {m.param for m in stream.by_role("norm")} >= {"blocks.0.gamma", "blocks.1.norm.weight", "blocks.0.dw.bias"}


def test_group_norm_keeps_equal_parts() -> None:
    graph = build("groupnorm")[2]
    group = graph["a.weight"]
    assert group.multiple == 4
    kept = sample_kept(group, 0.5)
    assert [sum(c // 4 == part for c in kept) for part in range(4)] == [2, 2, 2, 2]


def test_branches_follow_the_producers() -> None:
    branches = {group.id: group.branch for group in build("pillars")[2].groups}
    assert branches == {
        "camera.0.0.weight": "camera",
        "camera.1.0.weight": "camera",
        "lidar.point.weight": "lidar",
        "lidar.bev.0.weight": "lidar",
        "fuse.0.weight": "fusion",
    }


def test_producers_of_two_branches_are_fusion() -> None:
    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.camera, self.lidar = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1)
            self.head = nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.camera(x) + self.lidar(x))  # type: ignore[no-any-return]

    graph = find_groups(Added(), plain(), BRANCHES)
    assert [(g.id, g.branch) for g in graph.groups] == [("camera.weight+lidar.weight", "fusion")]


def test_says_why_a_module_is_frozen() -> None:
    graph = find_groups(zoo.Stubborn().eval(), plain(), {})
    reasons = {frozen.module: frozen.reason for frozen in graph.frozen}
    assert graph.groups == ()
    for module, words in {
        "sized": "take it from the tensor's shape",
        "before": "grouped convolution",
        "grouped": "grouped convolution",
        "soft": "mixes its channels",
        "tied": "shares its weights",
        "twin": "shares its weights",
        "free": "mixes its channels",
        "unused": "does not call it",
        "head": "the model's output",
        "Stubborn": "no standard layer",
    }.items():
        assert words in reasons[module], module


def test_kept_modules_keep_their_outputs_but_not_their_inputs() -> None:
    model = zoo.settled(zoo.Residual())
    graph = find_groups(model, plain(), {}, ["stem"])
    assert list(graph.widths) == ["a.0.weight"]
    assert {f.module: f.reason for f in graph.frozen}["b"] == "kept by the task or the recipe"
    assert set(find_groups(model, plain(), {}, ["head"]).widths) == {"a.0.weight", "b.weight+stem.0.weight"}
    with pytest.raises(TaskError, match="expected `keep` to name modules of the model; got 'hed'"):
        find_groups(model, plain(), {}, ["hed"])


def test_a_shuffle_of_channels_is_frozen() -> None:
    class Shuffled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 32, 1), nn.Conv2d(32, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            order = torch.randperm(32, generator=torch.Generator().manual_seed(3))
            return self.b(self.a(x)[:, order])  # type: ignore[no-any-return]

    graph = find_groups(Shuffled(), plain(), {})
    assert graph.groups == ()
    assert "shuffled" in graph.frozen[0].reason


def test_halves_that_the_code_cuts_itself_are_frozen() -> None:
    class Swapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            low, high = self.a(x).chunk(2, 1)
            return self.b(torch.cat([high, low], 1))  # type: ignore[no-any-return]

    graph = find_groups(Swapped(), plain(), {})
    # equal numbers from both halves would work, others not
    assert graph.groups == ()
    assert "changes the other channels" in graph.frozen[0].reason


def test_torch_pruning_alone_where_the_numeric_finder_cannot_run() -> None:
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 8, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            if bool((y > 0).all()):
                raise ValueError("never seen in training")
            return self.c(self.b(y))  # type: ignore[no-any-return]

    graph = find_groups(Picky(), plain(), {}, ["b"])
    assert graph.widths == {"a.weight": 16}
    assert "only torch-pruning found a.weight" in graph.notes
    reasons = {frozen.module: frozen.reason for frozen in graph.frozen}
    assert reasons["b"] == "kept by the task or the recipe"
    assert "fails on other values (ValueError: never seen in training)" in reasons["c"]


def test_layers_called_by_keyword_are_seen() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(input=self.a(input=x))  # type: ignore[no-any-return]

    model = Keyword()
    graph = find_groups(model, plain(), {})
    assert graph.widths == {"a.weight": 8}
    assert CostModel(graph, model, plain()).dense_macs == 64 * (3 * 8 + 8 * 2)


class Random(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)
        self.count = 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.b(self.a(x) * self.count)  # type: ignore[no-any-return]


def test_a_forward_that_is_not_repeatable_is_refused() -> None:
    with pytest.raises(TraceError, match="repeatable forward pass"):
        find_groups(Random(), plain(), {})


def test_wrong_inputs_are_a_clear_error() -> None:
    with pytest.raises(TraceError, match=r"expected forward\(\*\*inputs\) to run on the example inputs; got TypeError"):
        find_groups(zoo.Residual(), {"picture": zoo.image()}, {})


def test_a_model_that_cannot_be_copied_is_a_clear_error() -> None:
    model = zoo.Residual()
    model.cache = model.stem(zoo.image())  # a computed tensor with a graph behind it
    with pytest.raises(TraceError, match=r"copy\.deepcopy"):
        find_groups(model, plain(), {})


def test_the_watchdog_stops_a_forward_that_never_ends() -> None:
    class Endless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            while True:
                time.sleep(0.01)

    with pytest.raises(TraceError, match=r"expected the channel groups within 0\.5 s; .* raise the limit"):
        find_groups(Endless(), plain(), {}, watchdog_s=0.5)


def test_the_watchdog_passes_results_and_errors_on() -> None:
    def fail() -> int:
        raise ValueError("mine")

    assert run_within(5, lambda: 3, "late") == 3
    with pytest.raises(ValueError, match="mine"):
        run_within(5, fail, "late")
