"""The k-th smallest of very many scores without sorting a copy of them.

Scores of single weights are as many as the parameters. Floats order like integers once their bits are turned: so
counting the elements by their highest 16 bits, then by the next 16 of those that share the first, and so on, finds the
k-th smallest in two (float32) or four (float64) sweeps over blocks, and holds nothing but a block and the counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import repeat

import torch
from torch import Tensor

BLOCK = 1 << 16  # elements at a time
DIGIT = 16  # bits of a sweep


def kth_smallest(parts: Sequence[Tensor], index: int, among: Sequence[Tensor] | None = None) -> float:
    """What sorting all elements in ascending order would put at an index; exact.

    Args:
        parts: floating-point tensors of one dtype, without NaN.
        index: from 0.
        among: booleans of the parts' sizes, which elements count; default: all.

    Returns:
        The element.

    Raises:
        IndexError: there are not so many elements.
    """
    size = 64 if parts[0].dtype == torch.float64 else 32
    top, key = size - DIGIT, 0
    for shift in range(top, -1, -DIGIT):
        counts = torch.zeros(1 << DIGIT, dtype=torch.int64, device=parts[0].device)
        for block in _blocks(parts, among):
            keys = _sortable(block)
            if shift == top:
                digits = (keys >> top) + (1 << DIGIT - 1)
            else:
                digits = (keys[keys >> shift + DIGIT == key] >> shift) & (1 << DIGIT) - 1
            counts += torch.bincount(digits, minlength=1 << DIGIT)
        below = counts.cumsum(0)
        if not 0 <= index < int(below[-1]):
            raise IndexError(f"expected an index below {int(below[-1])}; got {index}; ask for an element that there is")
        digit = int(torch.searchsorted(below, index, right=True))
        index -= int(below[digit] - counts[digit])
        key = digit - (1 << DIGIT - 1) if shift == top else key << DIGIT | digit
    kind, whole = (torch.int64, torch.float64) if size == 64 else (torch.int32, torch.float32)
    return float(_turned(torch.tensor([key], dtype=kind)).view(whole))


def blocks_of(flat: Tensor) -> tuple[Tensor, ...]:
    """A vector as blocks that are small beside it, to make copies of."""
    blocks: tuple[Tensor, ...] = flat.split(BLOCK)
    return blocks


def _blocks(parts: Sequence[Tensor], among: Sequence[Tensor] | None) -> Iterator[Tensor]:
    for part, mask in zip(parts, among or repeat(None), strict=False):
        flat = blocks_of(part.detach().flatten())
        on = repeat(None) if mask is None else blocks_of(mask.flatten())
        for block, chosen in zip(flat, on, strict=False):
            values = block if chosen is None else block[chosen]
            yield values if values.dtype == torch.float64 else values.float()


def _sortable(values: Tensor) -> Tensor:
    return _turned(values.view(torch.int64 if values.dtype == torch.float64 else torch.int32))


def _turned(bits: Tensor) -> Tensor:
    """Bits of floats as integers of the same order, and back: negative floats have theirs the other way round."""
    info = torch.iinfo(bits.dtype)
    return bits ^ ((bits >> info.bits - 1) & info.max)
