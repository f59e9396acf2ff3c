"""SparseGPT against closed forms, least squares and the layers' own outputs (pipeline/scoring/sparsegpt.py)."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fusepress.pipeline.errors import StageError
from fusepress.pipeline.graph.activations import called_layers, matrices, second_moments, unfolded, weight_of
from fusepress.pipeline.graph.masks import MaskHolder, top_2to4, violations_2to4
from fusepress.pipeline.scoring.altermoma import weight_masks
from fusepress.pipeline.scoring.sparsegpt import prune_with_hessian, row_errors, sparsify_by_sparsegpt


def problem(seed: int, rows: int = 6, columns: int = 16, samples: int = 40) -> tuple[Tensor, Tensor]:
    """W_1RK and H_1KK of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, columns, generator=generator, dtype=torch.float64)
    mix = torch.eye(columns, dtype=torch.float64)
    x = x @ (mix + 0.6 * torch.randn(columns, columns, generator=generator, dtype=torch.float64))
    weight = torch.randn(1, rows, columns, generator=generator, dtype=torch.float64)
    return weight, (x.T @ x / samples)[None]


# --- the solver -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [None, 0.3, 0.8])
@pytest.mark.parametrize("scale", [1.0, 1e-6, 0.0], ids=["identity", "small", "no-input"])
def test_with_uncorrelated_inputs_it_is_magnitude_and_changes_nothing(sparsity: float | None, scale: float) -> None:
    weight, _ = problem(0)
    new, mask = prune_with_hessian(weight, scale * torch.eye(16, dtype=torch.float64)[None], sparsity=sparsity)
    expected = top_2to4(weight[0].abs()) if sparsity is None else weight_masks({"": weight[0].abs()}, sparsity)[""]
    assert torch.equal(mask[0], expected)
    assert torch.equal(new[0], torch.where(expected, weight[0], 0.0))


def test_one_removed_column_moves_the_others_as_the_optimal_brain_surgeon_does() -> None:
    weight, hessian = problem(1)
    mask = torch.ones_like(weight, dtype=torch.bool)
    mask[..., 0] = False
    new, _ = prune_with_hessian(weight, hessian, mask_GRK=mask, damping=0.0, refine_steps=0)
    inverse = hessian[0].inverse()
    expected = weight[0] - weight[0, :, :1] / inverse[0, 0] * inverse[0]
    torch.testing.assert_close(new[0], expected, rtol=1e-9, atol=1e-9)
    # and it costs w_q^2 / [H^-1]_qq, the saliency
    torch.testing.assert_close(row_errors(weight - new, hessian)[0], weight[0, :, 0].square() / inverse[0, 0])


@pytest.mark.parametrize("gone", [1, 5, 12])
@pytest.mark.parametrize("block", [3, 128])
def test_removed_columns_before_all_kept_ones_leave_the_least_squares_solution(gone: int, block: int) -> None:
    weight, hessian = problem(2)
    mask = torch.ones_like(weight, dtype=torch.bool)
    mask[..., :gone] = False
    new, _ = prune_with_hessian(weight, hessian, mask_GRK=mask, damping=0.0, block=block, refine_steps=0)
    h = hessian[0]
    best = torch.linalg.solve(h[gone:, gone:], (weight[0] @ h)[:, gone:].T).T
    torch.testing.assert_close(new[0, :, gone:], best, rtol=1e-8, atol=1e-8)
    assert int(new[0, :, :gone].count_nonzero()) == 0


def test_refining_reaches_the_least_squares_solution_of_any_mask() -> None:
    weight, hessian = problem(5)
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) > 0.5
    new, _ = prune_with_hessian(weight, hessian, mask_GRK=mask, damping=0.0, refine_steps=64)
    for row in range(weight.shape[1]):
        kept = mask[0, row]
        best = torch.linalg.solve(hessian[0][kept][:, kept], (weight[0, row] @ hessian[0])[kept])
        torch.testing.assert_close(new[0, row, kept], best, rtol=1e-6, atol=1e-6)
        assert int(new[0, row, ~kept].count_nonzero()) == 0


def test_every_refining_step_loses_less() -> None:
    weight, hessian = problem(6)
    errors = []
    for steps in (0, 1, 2, 4, 8, 16):
        new, _ = prune_with_hessian(weight, hessian, sparsity=0.5, damping=0.0, refine_steps=steps)
        errors.append(row_errors(weight - new, hessian))
    assert all((after <= before * (1 + 1e-9)).all() for before, after in itertools.pairwise(errors))
    assert errors[-1].sum() < 0.9 * errors[0].sum()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), sparsity=st.sampled_from([None, 0.5, 0.7]))
def test_no_row_is_worse_than_its_own_mask_without_the_update(seed: int, sparsity: float | None) -> None:
    weight, hessian = problem(seed)
    new, mask = prune_with_hessian(weight, hessian, sparsity=sparsity)
    plain = torch.where(mask, weight, 0.0)
    assert (row_errors(weight - new, hessian) <= row_errors(weight - plain, hessian)).all()
    assert int(new[~mask].count_nonzero()) == 0


@pytest.mark.parametrize(("sparsity", "most"), [(None, 0.5), (0.5, 0.75), (0.8, 0.95)])
def test_it_loses_less_than_magnitude_in_the_mean(sparsity: float | None, most: float) -> None:
    ours, magnitude = [], []
    for seed in range(30):
        weight, hessian = problem(seed, rows=8, columns=32, samples=200)
        new, _ = prune_with_hessian(weight, hessian, sparsity=sparsity)
        kept = top_2to4(weight[0].abs()) if sparsity is None else weight_masks({"": weight[0].abs()}, sparsity)[""]
        ours.append(row_errors(weight - new, hessian).sum())
        magnitude.append(row_errors(torch.where(kept, 0.0, weight), hessian).sum())
    assert torch.stack(ours).mean() < most * torch.stack(magnitude).mean()


@pytest.mark.parametrize("block", [4, 16, 128])
@pytest.mark.parametrize("groups", [1, 3])
def test_the_pattern_and_the_number_of_zeros_are_exact(block: int, groups: int) -> None:
    weights, hessians = zip(*(problem(seed, rows=5, columns=24) for seed in range(groups)), strict=True)
    weight, hessian = torch.cat(weights), torch.cat(hessians)
    new, mask = prune_with_hessian(weight, hessian, block=block)
    assert violations_2to4(new.flatten(0, 1)) == 0
    assert (mask.unflatten(-1, (-1, 4)).sum(-1) == 2).all()
    _, mask = prune_with_hessian(weight, hessian, sparsity=0.37, block=block)
    assert int((~mask).sum()) == round(0.37 * weight.numel())


def test_the_width_of_the_blocks_does_not_change_the_2to4_result() -> None:
    weight, hessian = problem(3, columns=24)
    whole = prune_with_hessian(weight, hessian, block=128)
    for block in (4, 8):
        found = prune_with_hessian(weight, hessian, block=block)
        assert torch.equal(found[1], whole[1])
        torch.testing.assert_close(found[0], whole[0], rtol=1e-9, atol=1e-10)


def test_a_singular_hessian_is_damped_and_one_that_is_not_finite_refused() -> None:
    weight, _ = problem(4)
    direction = torch.randn(16, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    new, mask = prune_with_hessian(weight, (direction @ direction.T)[None], damping=0.0)
    assert new.isfinite().all()
    assert int(new[~mask].count_nonzero()) == 0
    with pytest.raises(StageError, match=r"expected a finite Hessian; got NaN or infinity .* check the calib split"):
        prune_with_hessian(weight, torch.full((1, 16, 16), torch.nan))


# --- the layers' inputs -----------------------------------------------------------------------------------------------

CONVS = {
    "plain": nn.Conv2d(8, 6, 3),
    "strided-dilated": nn.Conv2d(8, 6, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(2, 1)),
    "same": nn.Conv2d(8, 6, (2, 4), padding="same"),
    "reflect": nn.Conv2d(8, 6, 3, padding=1, padding_mode="reflect"),
    "grouped": nn.Conv2d(8, 6, 3, padding=1, groups=2),
    "depthwise": nn.Conv2d(8, 16, 3, groups=8),
    "one": nn.Conv1d(8, 6, 5, stride=3),
    "three": nn.Conv3d(4, 6, (1, 2, 3), padding=(0, 1, 0)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", CONVS)
def test_a_convolution_is_its_matrix_times_its_columns(name: str) -> None:
    conv = copy.deepcopy(CONVS[name]).double()
    assert conv.bias is not None
    shape = {"one": (3, 8, 17), "three": (3, 4, 3, 4, 5)}.get(name, (3, 8, 7, 9))
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    columns = torch.cat(list(unfolded(conv, x)))
    (matrix,) = matrices(conv.weight.detach(), conv.groups)
    found = torch.einsum("grk,pgk->pgr", matrix, columns).flatten(1) + conv.bias
    expected = conv(x).flatten(2).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(found, expected)
    assert torch.equal(weight_of([matrix], conv.weight), conv.weight)


class Net(nn.Module):
    """A strided and a grouped convolution, a linear layer that is called twice, and one that never is."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(8, 3)
        self.unused = nn.Linear(8, 8)
        self.up = nn.ConvTranspose2d(8, 8, 2, 2)
        self.first = nn.Conv2d(4, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, groups=2)
        self.twice = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(torch.relu(self.second(torch.relu(self.first(x))))).mean((2, 3))
        return self.last(torch.relu(self.twice(torch.relu(self.twice(y)))))  # type: ignore[no-any-return]


def net() -> Net:
    torch.manual_seed(0)
    model = Net().eval()
    with torch.no_grad():  # channels of very different sizes: what magnitude cannot see
        model.first.weight *= torch.logspace(-1, 1, 8)[:, None, None, None]
    return model


def data(batches: int = 2) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(4, 4, generator=generator)
    return [
        {"x": torch.einsum("oc,nchw->nohw", mix, torch.randn(5, 4, 8, 8, generator=generator))} for _ in range(batches)
    ]


def test_layers_come_in_the_order_of_the_forward_pass_and_uncalled_ones_are_absent() -> None:
    names = [name for name, p in net().named_parameters() if p.ndim >= 2]
    layers = called_layers(net(), data()[0], names)
    assert list(layers) == ["first.weight", "second.weight", "twice.weight", "last.weight"]
    assert layers["twice.weight"].calls == 2


def test_every_call_of_a_layer_counts() -> None:
    model, seen = net(), []
    handle = model.twice.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().double()))
    for batch in data():
        model(**batch)
    handle.remove()
    x = torch.cat(seen)
    (found,) = second_moments(model, data(), called_layers(model, data()[0], ["twice.weight"])["twice.weight"])
    torch.testing.assert_close(found[0], x.T @ x / len(x))


def test_each_layer_is_pruned_on_what_the_sparse_layers_before_it_make() -> None:
    model, dense = net(), net()
    wanted = {"first.weight": None, "second.weight": None, "last.weight": 0.5}
    masks, results = sparsify_by_sparsegpt(model, data(), wanted)
    before = net()
    before.load_state_dict(model.state_dict() | {"second.weight": dense.second.weight})
    layer = called_layers(before, data()[0], ["second.weight"])["second.weight"]
    (matrix,) = matrices(dense.second.weight.detach().double(), 2)
    new, _ = prune_with_hessian(matrix, second_moments(before, data(), layer)[0])
    torch.testing.assert_close(model.second.weight, weight_of([new], dense.second.weight).float())
    assert [result.param for result in results] == ["first.weight", "second.weight", "last.weight"]
    MaskHolder(masks).check(model)
    assert all(violations_2to4(model.get_parameter(name)) == 0 for name in ("first.weight", "second.weight"))
    assert int((~masks["last.weight"]).sum()) == 12
    for untouched in ("unused.weight", "twice.weight", "up.weight"):
        assert torch.equal(model.get_parameter(untouched), dense.get_parameter(untouched))


def test_the_network_changes_less_than_by_magnitude() -> None:
    wanted: dict[str, float | None] = dict.fromkeys(("first.weight", "second.weight", "twice.weight"))
    ours, magnitude = net(), net()
    _, results = sparsify_by_sparsegpt(ours, data(8), wanted)
    MaskHolder({name: top_2to4(magnitude.get_parameter(name).detach().abs()) for name in wanted}).apply(magnitude)
    x = torch.cat([batch["x"] for batch in data(8)])
    with torch.no_grad():
        gap = [(m(x) - net()(x)).square().mean() for m in (ours, magnitude)]
    assert gap[0] < 0.5 * gap[1]
    for result in results:
        assert result.error is not None
        assert result.error_without_update is not None
        assert result.error <= result.error_without_update + 1e-9  # in the network it is stored in float32
        assert result.error_magnitude is not None
        assert 0 < result.error < result.error_magnitude < 1


def test_weights_without_a_hessian_are_chosen_by_magnitude_and_said_so() -> None:
    model, dense = net(), net()
    masks, results = sparsify_by_sparsegpt(model, data(), {"unused.weight": None, "up.weight": 0.5})
    assert torch.equal(masks["unused.weight"], top_2to4(dense.unused.weight.detach().abs()))
    assert int((~masks["up.weight"]).sum()) == dense.up.weight.numel() // 2
    assert all("by magnitude: the forward pass does not call" in result.note for result in results)
    MaskHolder(masks).check(model)


class Attend(nn.Module):
    def __init__(self, **options: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)
        with torch.no_grad():
            self.attention.out_proj.bias.uniform_(-1, 1)

    def forward(self, query: Tensor, memory: Tensor) -> Tensor:
        return self.attention(query, key=memory, value=memory.tanh(), need_weights=False)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("options", [{}, {"kdim": 4, "vdim": 4}], ids=["packed", "apart"])
def test_the_projections_of_an_attention_read_query_key_value_and_heads(options: dict[str, int]) -> None:
    torch.manual_seed(0)
    model = Attend(**options).double().eval()
    query, memory = torch.randn(3, 5, 8).double(), torch.randn(3, 7, options.get("kdim", 8)).double()
    inputs = {"query": query, "memory": memory}
    names = [name for name, p in model.named_parameters() if p.ndim >= 2]
    layers = called_layers(model, inputs, names)
    assert list(layers)[-1] == "attention.out_proj.weight"
    moments = [m for layer in layers.values() for m in second_moments(model, [inputs], layer)]
    expected = [query, memory, memory.tanh()]
    for found, x in zip(moments, expected, strict=False):
        flat = x.flatten(0, 1)
        torch.testing.assert_close(found[0], flat.T @ flat / len(flat))
    projection = model.attention.out_proj
    outputs = (model(**inputs) - projection.bias).flatten(0, 1)
    weight = projection.weight.detach()
    torch.testing.assert_close(weight @ moments[3][0] @ weight.T, outputs.T @ outputs / len(outputs))

    dense = copy.deepcopy(model)
    masks, results = sparsify_by_sparsegpt(model, [inputs], dict.fromkeys(names))
    MaskHolder(masks).check(model)
    assert all(violations_2to4(model.get_parameter(name)) == 0 for name in names)
    assert not any(result.note for result in results)
    plain = copy.deepcopy(dense)
    MaskHolder({name: top_2to4(dense.get_parameter(name).detach().abs()) for name in names}).apply(plain)
    with torch.no_grad():
        gaps = [(m(**inputs) - dense(**inputs)).square().mean() for m in (model, plain)]
    assert gaps[0] < gaps[1]


def test_a_weight_shared_by_two_layers_gets_the_inputs_of_both() -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    second.weight = first.weight
    model = nn.Sequential(first, nn.ReLU(), second).eval()
    x = torch.randn(30, 8)
    layer = called_layers(model, {"input": x}, ["0.weight"])["0.weight"]
    (found,) = second_moments(model, [{"input": x}], layer)
    with torch.no_grad():
        both = torch.cat([x, model[:2](x)]).double()
    torch.testing.assert_close(found[0], both.T @ both / len(both))


def test_columns_of_a_kernel_are_groups_of_channels() -> None:
    """Column k of the matrix is (kernel position, channel): four in a row are four channels at one position."""
    weight = torch.arange(2 * 8 * 3 * 3).reshape(2, 8, 3, 3)
    (matrix,) = matrices(weight)
    for row, position, channel in itertools.product(range(2), range(9), range(8)):
        assert matrix[0, row, position * 8 + channel] == weight[row, channel, position // 3, position % 3]
