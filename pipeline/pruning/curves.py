"""What each width of each coupled group does to the network: the curves that an allocation chooses from. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from fusepress.pipeline.errors import StageError
from fusepress.pipeline.recipe import DistortionConfig

Floats = npt.NDArray[np.float64]
Reading = Literal["A", "B"]
EPSILON = 1e-12  # keeps a modality that says nothing (information 0) from being divided by


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One group at each of its widths, everything else dense.

    Attributes:
        widths: dense first, descending, (K,).
        distortion: damage to the outputs, in units of their variance, (K,); 0 at the dense width.
        fisher: functional Fisher information of each modality, (K, M); M = 0 where it was not measured.
    """

    widths: tuple[int, ...]
    distortion: Floats
    fisher: Floats

    def total(self, eta: float, reading: Reading = "B") -> Floats:
        """Distortion plus eta times the information term (MMPrune4U, eq. 11), (K,).

        Reading B: the relative change of each modality's information against the dense network, summed; nothing at
        the dense width. Reading A, the paper's words: the information itself, summed. The two differ in more than a
        constant: A rewards a loss of information, while the paper's text asks that it be kept.

        With eta = 0 this is the distortion itself, to the last bit (RD-Prune).

        Raises:
            StageError: the information is wanted but was not measured.
        """
        if eta == 0:
            return self.distortion
        return self.distortion + eta * self.regulariser(reading)

    def regulariser(self, reading: Reading = "B") -> Floats:
        """The information term without its weight, (K,)."""
        if self.fisher.shape[1] == 0:
            raise StageError(
                "expected Fisher information in the distortion table; got a table measured with eta 0; measure it "
                "again with prune.distortion.eta above 0 or auto"
            )
        if reading == "A":
            literal: Floats = self.fisher.sum(axis=1)
            return literal
        dense = self.fisher[:1]
        change: Floats = (np.abs(self.fisher - dense) / (dense + EPSILON)).sum(axis=1)
        return change


@dataclass(frozen=True, slots=True, kw_only=True)
class DistortionTable:
    """The curves of all groups.

    Attributes:
        curves: by group id.
        eta: weight of the information term, a number even where the recipe says auto.
        reading: of that term.
        modalities: columns of the curves' `fisher`.
        samples: calibration samples that were used.
        macs: multiply-accumulates for one sample behind each group's consumers, by group id.
        notes: groups that had to be measured in another way, and why.
        facts: what was measured about the measurement itself (seconds, passes).
    """

    curves: Mapping[str, Curve]
    eta: float
    reading: Reading
    modalities: tuple[str, ...]
    samples: int
    macs: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    facts: Mapping[str, float] = field(default_factory=dict)

    def values(self, group: str) -> Floats:
        """What is minimised for a group, (K,)."""
        return self.curves[group].total(self.eta, self.reading)


def resolve_eta(curves: Mapping[str, Curve], config: DistortionConfig) -> float:
    """The weight of the information term; auto makes the medians of both terms over all narrower widths equal."""
    if config.eta != "auto":
        return float(config.eta)
    measured = [curve for curve in curves.values() if curve.fisher.shape[1]]
    distortion = np.concatenate([np.zeros(0), *(curve.distortion[1:] for curve in measured)])
    terms = np.concatenate([np.zeros(0), *(curve.regulariser(config.reading)[1:] for curve in measured)])
    middle = float(np.median(terms)) if len(terms) else 0.0
    return float(np.median(distortion)) / middle if middle > 0 else 0.0


__all__ = ["Curve", "DistortionTable", "Reading", "resolve_eta"]
