"""Which widths a coupled group may take: aligned steps from dense downwards, and nothing at all for a whole block."""

from __future__ import annotations

import math
from collections.abc import Collection

from fusepress.pipeline.graph.plan import Group
from fusepress.pipeline.recipe import PruneConfig


def ladder_widths(
    group: Group, config: PruneConfig, align: int, notes: list[str], removable: Collection[str] = ()
) -> tuple[int, ...]:
    """Widths that a group may take, dense first, descending.

    Args:
        group: the group.
        config: floors, kept modules, and whether whole residual blocks may go.
        align: channel multiple of the target.
        notes: a group that cannot follow the alignment is noted here, with the reason.
        removable: ids of groups without which the model still runs, for a shortcut carries the signal on. They may
            take width 0 whatever the floors say (`config.blocks`): a floor limits how thin a layer gets, and a block
            that is gone is not thin.

    Returns:
        The dense width; multiples of the step below it that keep the floors; 0 where the whole block may go.
    """
    span = group.span  # alignment and the least width count the layers' channels, not attention heads
    step = math.lcm(align // math.gcd(align, span), group.multiple)
    lowest = max(1, math.ceil(config.min_channels / span), math.ceil(config.floor * group.width - 1e-9))
    if any(_inside(producer, path) for producer in group.producers for path in config.keep):
        notes.append(f"{group.id}: kept by prune.keep")
        return (group.width,)
    widths = [group.width]
    if group.width <= step:
        notes.append(f"{group.id}: stays at {group.width}, no wider than one aligned step of {step}")
    else:
        widths += [w for w in range(group.width // step * step, 0, -step) if lowest <= w < group.width]
        if group.width % step:
            notes.append(f"{group.id}: the dense width {group.width} is no multiple of {step}; narrower ones are")
    if config.blocks and group.id in removable:
        widths.append(0)
    return tuple(widths)


def _inside(param: str, path: str) -> bool:
    return param == path or param.startswith(f"{path}.")


__all__ = ["ladder_widths"]
