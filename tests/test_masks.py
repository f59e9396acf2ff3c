"""2:4 masks and the holder of any mask (pipeline/graph/masks.py)."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from fusepress.pipeline.errors import CheckpointError, StageError, TrainingError
from fusepress.pipeline.graph.masks import (
    MaskHolder,
    load_masks,
    masks_2to4,
    save_masks,
    top_2to4,
    violations_2to4,
    weights_2to4,
    weights_unstructured,
)


class Zoo(nn.Module):
    """One of each kind of weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.conv = nn.Conv2d(8, 12, 3)
        self.odd = nn.Conv2d(6, 8, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.grouped = nn.Conv2d(16, 8, 1, groups=2)
        self.grouped_odd = nn.Conv2d(12, 8, 1, groups=2)
        self.up = nn.ConvTranspose2d(8, 8, 2)
        self.volume = nn.Conv3d(4, 4, 3)
        self.norm = nn.BatchNorm2d(12)
        self.linear = nn.Linear(8, 5)
        self.attention = nn.MultiheadAttention(8, 2)
        self.cross = nn.MultiheadAttention(8, 2, kdim=4, vdim=6)
        self.memory = nn.GRU(8, 8)
        self.table = nn.Parameter(torch.ones(4, 4))


def test_the_right_weights_are_masked_and_every_other_one_is_listed_with_its_reason() -> None:
    masks, skipped = masks_2to4(Zoo())
    assert set(masks) == {
        "conv.weight",
        "grouped.weight",
        "volume.weight",
        "linear.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "cross.q_proj_weight",
        "cross.k_proj_weight",
        "cross.out_proj.weight",
    }
    reasons = {skip.param: skip.reason for skip in skipped}
    assert "fewer than 4" in reasons["stem.weight"]
    assert "no multiple of 4" in reasons["odd.weight"]
    assert "depthwise" in reasons["depthwise.weight"]
    assert "6 input channels" in reasons["grouped_odd.weight"]
    assert "transposed" in reasons["up.weight"]
    assert "no multiple of 4" in reasons["cross.v_proj_weight"]
    assert "GRU" in reasons["memory.weight_ih_l0"]
    assert "Zoo" in reasons["table"]
    weights = {name for name, p in Zoo().named_parameters() if p.dim() >= 2}
    assert set(masks) | set(reasons) == weights


def test_a_tied_weight_is_masked_once() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    masks, skipped = masks_2to4(model)
    assert list(masks) == ["0.weight"]
    assert [(skip.param, skip.reason) for skip in skipped] == [("1.weight", "shares its weight with 0.weight")]


@pytest.mark.parametrize("shape", [(5, 8), (3, 12, 3, 3), (2, 4, 1), (2, 8, 2, 3, 2)])
def test_the_choice_keeps_the_largest_magnitude_of_all_six_patterns(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))
    mask = top_2to4(weight.detach().abs())
    flat_w, flat_m = weight.flatten(2) if len(shape) > 2 else weight[..., None], mask.reshape(*shape[:2], -1)
    for k, r in itertools.product(range(shape[0]), range(flat_w.shape[2])):
        for first in range(0, shape[1], 4):
            w, m = flat_w[k, first : first + 4, r].abs(), flat_m[k, first : first + 4, r]
            best = max(float(w[list(pair)].sum()) for pair in itertools.combinations(range(4), 2))
            assert int(m.sum()) == 2
            assert float(w[m].sum()) == pytest.approx(best)


def test_equal_weights_keep_the_earlier_ones() -> None:
    assert top_2to4(torch.full((1, 4), -1.0).abs()).tolist() == [[True, True, False, False]]


def test_a_group_runs_over_input_channels_not_over_the_kernel() -> None:
    weight = torch.zeros(1, 4, 2, 2)
    weight[0, 0] = 1.0  # all four kernel positions of one channel: legal for TensorRT
    assert violations_2to4(weight) == 0
    weight = torch.zeros(1, 4, 2, 2)
    weight[0, :, 0, 0] = 1.0  # one kernel position of four channels: not
    assert violations_2to4(weight) == 1


def test_batch_norm_folding_keeps_the_mask() -> None:
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12)
    norm.weight.data.uniform_(-2, 2)
    assert norm.running_var is not None
    norm.running_var.uniform_(0.1, 3)
    model = nn.Sequential(conv, norm).eval()
    masks, _ = masks_2to4(model)
    holder = MaskHolder({"0.weight": masks["0.weight"]})
    holder.apply(model)
    folded = fuse_conv_bn_eval(conv, norm)
    assert violations_2to4(folded.weight) == 0
    MaskHolder({"weight": masks["0.weight"]}).check(folded)


def test_apply_zeroes_exactly_the_masked_weights_and_check_agrees() -> None:
    model = nn.Linear(8, 3)
    before = model.weight.detach().clone()
    mask = torch.rand(3, 8, generator=torch.Generator().manual_seed(1)) > 0.7  # unstructured
    holder = MaskHolder({"weight": mask})
    with pytest.raises(TrainingError, match=r"masked weight to be zero; got .* at weight; call hooks.after_step"):
        holder.check(model)
    holder.apply(model)
    holder.check(model)
    assert torch.equal(model.weight, torch.where(mask, before, torch.zeros(())))
    assert holder.density() == pytest.approx(float(mask.float().mean()))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_no_optimiser_revives_a_masked_weight(optimizer: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(8, 4)
    optim: torch.optim.Optimizer
    if optimizer == "sgd":
        optim = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    else:
        optim = torch.optim.AdamW(model.parameters(), 0.1, weight_decay=0.1)
    model(torch.randn(16, 8)).square().sum().backward()
    optim.step()  # momentum of what will be masked
    masks, _ = masks_2to4(model)
    holder = MaskHolder(masks)
    holder.apply(model)
    for _ in range(3):
        optim.zero_grad()
        (model(torch.randn(16, 8)) - 1).square().sum().backward()
        holder.apply_to_gradients(model)
        grad = model.weight.grad
        assert isinstance(grad, Tensor)
        assert int(grad[~masks["weight"]].count_nonzero()) == 0
        optim.step()
        holder.apply(model)
        holder.check(model)


def test_saved_masks_are_read_back_and_the_bytes_are_always_the_same(tmp_path: Path) -> None:
    masks, _ = masks_2to4(Zoo())
    save_masks(masks, tmp_path / "a.safetensors")
    save_masks(dict(reversed(masks.items())), tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    loaded = load_masks(tmp_path / "a.safetensors")
    assert set(loaded) == set(masks)
    assert all(torch.equal(loaded[name], masks[name]) and loaded[name].dtype == torch.bool for name in masks)


def test_a_damaged_or_foreign_mask_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "masks.safetensors"
    with pytest.raises(CheckpointError, match="run the sparsify stage again"):
        load_masks(path)
    save_masks({"weight": torch.ones(4, 4, dtype=torch.bool)}, path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match="expected a safetensors file of masks"):
        load_masks(path)
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(4, 4)}, path)
    with pytest.raises(CheckpointError, match=r"masks of 0 and 1 as uint8; got 'weight' of torch.float32"):
        load_masks(path)


def test_masks_of_another_model_are_refused() -> None:
    holder = MaskHolder({"weight": torch.ones(4, 4, dtype=torch.bool)})
    with pytest.raises(CheckpointError, match=r"a parameter weight of shape \(4, 4\).*got shape \(4, 8\)"):
        holder.apply(nn.Linear(8, 4))
    with pytest.raises(CheckpointError, match="got no such parameter in ReLU"):
        holder.check(nn.ReLU())


def test_weights_that_are_not_finite_are_refused() -> None:
    model = nn.Linear(8, 4)
    model.weight.data[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match="NaN or infinity in weight"):
        masks_2to4(model)


# --- by score, and which weights --------------------------------------------------------------------------------------


def test_masks_by_score_keep_the_two_highest_and_low_is_not_large() -> None:
    model = nn.Linear(8, 2)
    scores = {"weight": torch.tensor([[-9.0, -1.0, 0.5, -2.0, 1.0, 2.0, 3.0, 4.0]] * 2)}
    masks, _ = masks_2to4(model, scores)
    assert masks["weight"][0].tolist() == [False, True, True, False, False, False, True, True]


def test_a_spared_weight_is_listed_with_its_reason_and_needs_no_score() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    masks, skipped = masks_2to4(model, {"1.weight": torch.rand(8, 8)}, dense={"0.weight": "camera stays dense"})
    assert list(masks) == ["1.weight"]
    assert [(skip.param, skip.reason) for skip in skipped] == [("0.weight", "camera stays dense")]


@pytest.mark.parametrize(
    ("score", "got"),
    [(None, "got none"), (torch.ones(4, 4), r"got shape \(4, 4\)"), (torch.full((2, 8), torch.nan), "finite: False")],
    ids=["missing", "another-shape", "nan"],
)
def test_scores_of_another_model_are_refused(score: Tensor | None, got: str) -> None:
    scores = {} if score is None else {"weight": score}
    with pytest.raises(StageError, match=rf"expected finite scores of shape \(2, 8\).*{got}.* at weight"):
        masks_2to4(nn.Linear(8, 2), scores)


def test_unstructured_masks_may_take_any_layer_but_nothing_else() -> None:
    eligible, skipped = weights_unstructured(Zoo())
    two_four, _ = weights_2to4(Zoo())
    assert set(two_four) < set(eligible)
    assert set(eligible) - set(two_four) == {
        "stem.weight",
        "odd.weight",
        "depthwise.weight",
        "grouped_odd.weight",
        "up.weight",
        "cross.v_proj_weight",
    }
    assert {skip.param for skip in skipped} == {"table", "memory.weight_ih_l0", "memory.weight_hh_l0"}
