"""Surgery on the user's own class, and checkpoints that are missing, damaged, of another model or not finite."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fusepress
from fusepress.pipeline.errors import CheckpointError
from fusepress.pipeline.graph.apply import apply_plan, architecture_sha256, load_checkpoint, weights_bytes
from fusepress.pipeline.graph.check import sample_kept
from fusepress.pipeline.graph.groups import find_groups
from fusepress.pipeline.graph.plan import Member, PlannedGroup, PrunePlan
from tests import graph_models as zoo

INPUTS = {"x": zoo.image()}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are tiny
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def pruned(model: nn.Module, share: float = 0.5, inputs: dict[str, Tensor] | None = None) -> PrunePlan:
    graph = find_groups(model, inputs or INPUTS, {})
    plan = graph.plan({group.id: sample_kept(group, share) for group in graph.groups})
    apply_plan(model, plan)
    return plan


def saved(model: nn.Module, path: Path) -> Path:
    path.write_bytes(weights_bytes(model))
    return path


def test_layers_say_what_their_tensors_are() -> None:
    model = zoo.Depthwise()
    pruned(model)
    assert (model.stem.in_channels, model.stem.out_channels) == (3, 8)
    assert model.act.num_parameters == 8
    assert (model.dw.in_channels, model.dw.out_channels, model.dw.groups) == (8, 16, 8)
    assert model.bn.num_features == 16
    assert (model.se.down.in_channels, model.se.down.out_channels) == (16, 4)
    decoder = zoo.Decoder()
    pruned(decoder)
    assert (decoder.up.in_channels, decoder.up.out_channels) == (8, 6)
    assert (decoder.dw.in_channels, decoder.dw.out_channels, decoder.dw.groups) == (6, 6, 6)
    flat = zoo.Flatten()
    pruned(flat)
    assert (flat.first.in_features, flat.first.out_features) == (64, 6)
    block = zoo.ConvNext()
    pruned(block)
    first = block.blocks[0]
    assert isinstance(first, zoo.Block)
    assert first.norm.normalized_shape == (8,)
    assert first.gamma.shape == (8,)
    normed = zoo.GroupNormed()
    pruned(normed)
    assert (normed.gn.num_channels, normed.gn.num_groups) == (8, 4)


def test_surgery_keeps_dtype_gradient_flags_and_trains() -> None:
    model = zoo.Residual()
    plan = pruned(model)
    fresh = zoo.Residual().to(torch.bfloat16)
    fresh.a.requires_grad_(False)
    assert apply_plan(fresh, plan) is fresh
    assert {p.dtype for p in fresh.parameters()} == {torch.bfloat16}
    assert [name for name, p in fresh.named_parameters() if not p.requires_grad] == [
        name for name, _ in fresh.named_parameters() if name.startswith("a.")
    ]
    model.train()
    model(zoo.image()).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


def test_surgery_takes_exactly_the_kept_rows() -> None:
    model = zoo.Concat()
    dense = {key: value.clone() for key, value in model.state_dict().items()}
    plan = pruned(model)
    kept = {group.id: list(group.kept) for group in plan.groups}
    state = model.state_dict()
    inputs = kept["a.0.weight"] + [8 + c for c in kept["b.0.weight"]]
    assert torch.equal(state["b.1.running_mean"], dense["b.1.running_mean"][kept["b.0.weight"]])
    assert torch.equal(state["mix.0.weight"], dense["mix.0.weight"][kept["mix.0.weight"]][:, inputs])


def test_a_plan_is_applied_once_and_to_its_own_architecture() -> None:
    model = zoo.Residual()
    plan = pruned(model)
    shapes = [p.shape for p in model.parameters()]
    with pytest.raises(CheckpointError, match=r"expected the architecture .* that the plan .* apply once"):
        apply_plan(model, plan)
    with pytest.raises(CheckpointError, match="at Concat"):
        apply_plan(zoo.Concat(), plan)
    assert [p.shape for p in model.parameters()] == shapes


@pytest.mark.parametrize(
    ("member", "words"),
    [
        (Member(param="no.weight", dim=0), "expected a tensor 'no.weight' of the plan in the model"),
        (Member(param="head", dim=0), "expected a tensor 'head'"),
        (Member(param="head.weight", dim=0, offset=30), "expected head.weight to hold index"),
        (Member(param="head.weight", dim=9), "of dimension 9"),
    ],
)
def test_a_damaged_plan_changes_nothing(member: Member, words: str) -> None:
    model = zoo.Residual()
    before = architecture_sha256(model)
    good = Member(param="a.0.weight", dim=0)
    group = PlannedGroup(id="g", branch="b", width=24, kept=(0, 1), members=(good, member))
    with pytest.raises(CheckpointError, match=words):
        apply_plan(model, PrunePlan(arch_sha256=before, groups=(group,)))
    assert architecture_sha256(model) == before


def test_the_architecture_hash_sees_shapes_and_classes_not_values() -> None:
    assert architecture_sha256(zoo.Residual()) == architecture_sha256(zoo.Residual())
    other = zoo.Residual()
    other.bn = nn.InstanceNorm2d(16, affine=True, track_running_stats=True)  # type: ignore[assignment]  # same shapes
    assert architecture_sha256(zoo.Residual()) != architecture_sha256(other)


def test_load_gives_the_compressed_model_back(tmp_path: Path) -> None:
    model = zoo.settled(zoo.PillarNet())
    inputs = zoo.pillar_inputs()
    plan = pruned(model, 0.5, inputs)
    (tmp_path / "plan.json").write_text(plan.to_json())
    saved(model, tmp_path / "weights.safetensors")
    again = fusepress.load(zoo.PillarNet(), str(tmp_path / "plan.json"), str(tmp_path / "weights.safetensors"))
    assert not again.training
    assert type(again) is zoo.PillarNet
    for name, value in model(**inputs).items():
        assert torch.equal(again(**inputs)[name], value)


def test_load_without_a_plan_is_a_dense_model(tmp_path: Path) -> None:
    model = zoo.settled(zoo.Concat())
    again = fusepress.load(zoo.Concat(), None, saved(model, tmp_path / "w.safetensors"))
    assert torch.equal(again(zoo.image()), model(zoo.image()))


def test_load_refuses_the_weights_of_another_plan(tmp_path: Path) -> None:
    model = zoo.Residual()
    plan = pruned(model)
    (tmp_path / "plan.json").write_text(plan.to_json())
    dense = saved(zoo.Residual(), tmp_path / "dense.safetensors")
    with pytest.raises(CheckpointError, match=r"wrong shape: stem\.0\.weight \(16, 3, 3, 3\) instead of \(8, "):
        fusepress.load(zoo.Residual(), tmp_path / "plan.json", dense)
    with pytest.raises(CheckpointError, match="expected the architecture"):
        fusepress.load(zoo.Concat(), tmp_path / "plan.json", dense)


def test_equal_states_are_equal_bytes() -> None:
    model = zoo.Residual()
    assert weights_bytes(model) == weights_bytes(model)


@pytest.mark.parametrize("wrap", [dict, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s}])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_torch_checkpoints_of_common_shapes(tmp_path: Path, wrap: Any, prefix: str) -> None:
    model = zoo.settled(zoo.Residual())
    path = tmp_path / "model.pt"
    torch.save(wrap({prefix + name: tensor for name, tensor in model.state_dict().items()}), path)
    other = zoo.Residual()
    load_checkpoint(other, path)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in other.state_dict().items())


def test_tied_weights_and_batch_counts_may_be_missing(tmp_path: Path) -> None:
    model = zoo.Stubborn()
    state = {k: v for k, v in model.state_dict().items() if k != "twin.weight"}
    save_file(state, tmp_path / "tied.safetensors")
    load_checkpoint(zoo.Stubborn(), tmp_path / "tied.safetensors")
    counted = {k: v for k, v in zoo.Residual().state_dict().items() if not k.endswith("num_batches_tracked")}
    save_file(counted, tmp_path / "counted.safetensors")
    load_checkpoint(zoo.Residual(), tmp_path / "counted.safetensors")


class Payload:
    """What a pickle could hide."""


def test_bad_checkpoints_are_clear_errors_and_load_nothing(tmp_path: Path) -> None:
    model = zoo.Residual()
    good = saved(zoo.settled(zoo.Residual()), tmp_path / "good.safetensors")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(good.read_bytes()[:-100])
    junk = tmp_path / "junk.pt"
    junk.write_bytes(b"not a checkpoint")
    evil = tmp_path / "evil.pt"
    torch.save({"state_dict": Payload()}, evil)
    empty = tmp_path / "empty.pt"
    torch.save({"epoch": 3}, empty)
    other = saved(zoo.Concat(), tmp_path / "other.safetensors")
    nan = load_file(good)
    nan["a.1.running_var"][2] = float("nan")
    save_file(nan, tmp_path / "nan.safetensors")
    for path, words in [
        (tmp_path / "none.safetensors", r"expected a checkpoint; got no file at .*none\.safetensors"),
        (tmp_path, "expected a checkpoint; got no file"),
        (cut, r"expected a whole checkpoint .* at .*cut\.safetensors"),
        (junk, r"expected a whole checkpoint .* at .*junk\.pt"),
        (evil, r"expected a whole checkpoint .* at .*evil\.pt"),
        (empty, "expected named tensors; got dict without any"),
        (other, r"expected a checkpoint of Residual; .* missing: a\.0\.weight|missing: stem\.0\.weight"),
        (tmp_path / "nan.safetensors", r"expected finite weights; got 1 NaN or infinite values in a\.1\.running_var"),
    ]:
        with pytest.raises(CheckpointError, match=words):
            load_checkpoint(model, path)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
