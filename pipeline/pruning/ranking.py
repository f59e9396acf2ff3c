"""One ranking over all groups: blocks of channels leave in the order of the score they lose per cost they save."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fusepress.pipeline.errors import StageError
from fusepress.pipeline.graph.cost import Ints
from fusepress.pipeline.pruning.spend import Limit, Spend


@dataclass(frozen=True, slots=True, kw_only=True)
class Ladder:
    """The widths that a group may take, from dense downwards, and the summed score that each keeps."""

    widths: tuple[int, ...]
    worth: tuple[float, ...]


class Ranking:
    """Where every group stands on its ladder."""

    def __init__(self, *, ladders: list[Ladder], spend: Spend, per_cost: bool) -> None:
        self.ladders = ladders
        self.spend = spend
        self.per_cost = per_cost
        self.level = [0] * len(ladders)

    def widths(self) -> Ints:
        """Width of every group, (G,)."""
        return np.array([x.widths[at] for x, at in zip(self.ladders, self.level, strict=True)], dtype=np.int64)

    def cut(self, limit: Limit) -> None:
        """Remove blocks, the cheapest loss first, until the limit holds."""
        while limit.exceeded(here := self.spend.total(self.widths(), limit.branch)):
            groups = [g for g, ladder in enumerate(self.ladders) if self.level[g] + 1 < len(ladder.widths)]
            saved = here - self.spend.total(self._moved(groups, 1), limit.branch)
            useful = [k for k in range(len(groups)) if saved[k] > 0]
            if not useful:
                self._leap(limit)
                continue
            best = min(useful, key=lambda k: (self._loss(groups[k], self.level[groups[k]], int(saved[k])), groups[k]))
            self.level[groups[best]] += 1

    def _leap(self, limit: Limit) -> None:
        """Where no single step saves anything, as latency goes in stairs: the best of the leaps over several.

        Raises:
            StageError: no leap saves anything either.
        """
        here = int(self.spend.total(self.widths(), limit.branch))
        leaps = [(g, at) for g, x in enumerate(self.ladders) for at in range(self.level[g] + 1, len(x.widths))]
        trial = np.repeat(self.widths()[None], len(leaps), axis=0)
        for row, (g, at) in enumerate(leaps):
            trial[row, g] = self.ladders[g].widths[at]
        saved = here - self.spend.total(trial, limit.branch)
        useful = [k for k in range(len(leaps)) if saved[k] > 0]
        if not useful:
            raise StageError(
                f"expected that narrower groups cost less; got no saving below {here} units at {limit.key}; "
                "raise the budget, or use prune.allocation importance"
            )
        g, at = leaps[min(useful, key=lambda k: (self._lost(*leaps[k]) / int(saved[k]), leaps[k]))]
        self.level[g] = at

    def _lost(self, g: int, at: int) -> float:
        return self.ladders[g].worth[self.level[g]] - self.ladders[g].worth[at]

    def give_back(self, limits: Sequence[Limit]) -> None:
        """Restore blocks, the best first, until none fits any more."""
        while groups := [g for g in range(len(self.ladders)) if self.level[g] > 0]:
            trial = self._moved(groups, -1)
            broken = np.zeros(len(groups), dtype=bool)
            for limit in limits:
                broken |= limit.exceeded(self.spend.total(trial, limit.branch))
            fits = [k for k in range(len(groups)) if not broken[k]]
            if not fits:
                return
            spent = self.spend.total(trial) - self.spend.total(self.widths())
            best = max(
                fits, key=lambda k: (self._loss(groups[k], self.level[groups[k]] - 1, int(spent[k])), -groups[k])
            )
            self.level[groups[best]] -= 1

    def _moved(self, groups: Sequence[int], by: int) -> Ints:
        """Widths (len(groups), G) with each of the groups in turn moved by one level."""
        trial = np.repeat(self.widths()[None], len(groups), axis=0)
        for row, g in enumerate(groups):
            trial[row, g] = self.ladders[g].widths[self.level[g] + by]
        return trial

    def _loss(self, g: int, level: int, saved: int) -> float:
        """Score lost between a level and the next one down, per cost or per channel.

        The ratio ranks negative scores rightly too: it is the Lagrangian order when the budget is to be filled.
        """
        ladder = self.ladders[g]
        lost = ladder.worth[level] - ladder.worth[level + 1]
        return lost / max(1, saved) if self.per_cost else lost / (ladder.widths[level] - ladder.widths[level + 1])


__all__ = ["Ladder", "Ranking"]
