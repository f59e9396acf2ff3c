"""The k-th smallest score without a sorted copy."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusepress.pipeline.scoring import selection
from fusepress.pipeline.scoring.selection import kth_smallest

floats = st.floats(width=32, allow_nan=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@settings(deadline=None)
@given(values=st.lists(floats | st.sampled_from([0.0, -0.0, 1.0, math.inf, -math.inf]), min_size=1, max_size=40))
def test_every_element_is_what_sorting_puts_there(dtype: torch.dtype, values: list[float]) -> None:
    whole = torch.tensor(values, dtype=torch.float64).to(dtype)
    parts = list(whole.split([len(values) // 3, len(values) - len(values) // 3]))
    ordered = whole.sort().values.tolist()
    assert [kth_smallest(parts, index) for index in range(len(values))] == ordered


@settings(deadline=None)
@given(
    values=st.lists(st.tuples(floats, st.booleans()), min_size=1, max_size=40),
    block=st.integers(1, 50),
)
def test_only_chosen_elements_count_whatever_the_blocks(values: list[tuple[float, bool]], block: int) -> None:
    numbers, on = torch.tensor([v for v, _ in values]), torch.tensor([o for _, o in values])
    expected = numbers[on].sort().values.tolist()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "BLOCK", block)
        assert [kth_smallest([numbers], index, [on]) for index in range(len(expected))] == expected
        with pytest.raises(IndexError, match=f"expected an index below {len(expected)}; got {len(expected)}"):
            kth_smallest([numbers], len(expected), [on])


def test_close_numbers_and_subnormal_ones_are_told_apart() -> None:
    for dtype in (torch.float32, torch.float64):
        one = torch.ones((), dtype=dtype)
        info = torch.finfo(dtype)
        near = [one, torch.nextafter(one, one * 2), torch.nextafter(one, one * 0)]
        values = torch.stack([*near, one * info.smallest_normal, one * 0, torch.nextafter(one * 0, one)])
        assert [kth_smallest([values], i) for i in range(6)] == values.sort().values.tolist()


def test_a_middle_element_of_a_million_in_several_blocks() -> None:
    values = torch.randn(16 * selection.BLOCK + 12345, generator=torch.Generator().manual_seed(0))
    assert kth_smallest([values], 700_000) == float(values.sort().values[700_000])
