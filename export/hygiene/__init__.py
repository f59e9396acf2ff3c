"""Rewrites of an ONNX graph for importers that do not take it as it is; each is exact, and proven on the file.

A pass names what it would change (its precondition) and changes it; afterwards it must find nothing more to change (its
postcondition), and ONNX Runtime must compute the same from the same inputs before and after.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fusepress.export.hygiene import attention, grid_sample, integers, qdq, scatter
from fusepress.export.onnx import load_onnx, save_onnx
from fusepress.export.parity import check_parity, require_parity
from fusepress.export.passes import made_up_batch
from fusepress.export.runtime import OnnxSession
from fusepress.pipeline.errors import ExportError
from fusepress.pipeline.task import Batch

TOLERANCE = 1e-5  # float32: the order of sums may change
TRIALS = 3


class HygienePass(Protocol):
    """One kind of rewrite of the main graph: a module with these two functions."""

    def find(self, proto: Any) -> list[str]:
        """Names of the nodes (or inputs) that the pass would change; what it cannot change exactly is left out."""

    def apply(self, proto: Any) -> None:
        """Change all of them, in place."""


PASSES: Mapping[str, HygienePass] = {
    "scatter": scatter,
    "grid_sample": grid_sample,
    "attention": attention,
    "integers": integers,
    "qdq": qdq,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewrite:
    """What one pass changed, and how far outputs are apart, relative to their scale."""

    name: str
    changed: tuple[str, ...]
    max_rel: float


def rewrite(
    path_in: Path,
    path_out: Path,
    names: Sequence[str],
    batches: Iterable[Batch] | None = None,
    *,
    max_rel: float = TOLERANCE,
) -> list[Rewrite]:
    """Run passes on a file, each proven by ONNX Runtime before the next.

    Args:
        path_in: the model.
        path_out: where it goes; the bytes of `path_in` where nothing was to be changed.
        names: of passes, in order.
        batches: what the models are compared on; None takes made-up inputs (noise; zeros for indices).
        max_rel: largest allowed difference, relative to each output's scale.

    Returns:
        The passes that changed something.

    Raises:
        ExportError: an unknown pass, a pass that leaves something of its kind, or a difference in what is computed.
    """
    unknown = [name for name in names if name not in PASSES]
    if unknown:
        raise ExportError(f"expected passes of {list(PASSES)}; got {unknown}; correct the names")
    proto = load_onnx(path_in)
    name_all(proto)
    done: list[Rewrite] = []
    given = list(batches) if batches is not None else None
    candidate = path_out.with_name(f".{path_out.name}.candidate")
    before = path_in
    try:
        for name in names:
            changed = PASSES[name].find(proto)
            if not changed:
                continue
            PASSES[name].apply(proto)
            left = PASSES[name].find(proto)
            if left:
                raise ExportError(f"expected the pass {name!r} to rewrite all it finds; got {left} left; report it")
            save_onnx(proto, candidate)
            worst = _prove(before, candidate, given, name, max_rel)
            done.append(Rewrite(name=name, changed=tuple(changed), max_rel=worst))
            before = path_out
            candidate.replace(path_out)
    finally:
        candidate.unlink(missing_ok=True)
    if not done and path_in != path_out:
        path_out.write_bytes(path_in.read_bytes())
    return done


def apply_passes(proto: Any, names: Sequence[str]) -> None:
    """Run passes in place, in memory: what `rewrite` would leave, without its proof. Nodes need names (`name_all`)."""
    for name in names:
        if PASSES[name].find(proto):
            PASSES[name].apply(proto)


def name_all(proto: Any) -> None:
    """Passes know nodes by their names: a node without one, or with another's, gets its own."""
    seen: set[str] = set()
    for index, node in enumerate(proto.graph.node):
        if not node.name or node.name in seen:
            node.name = f"{node.op_type}/{index}"
        seen.add(node.name)


def _prove(before: Path, after: Path, batches: list[Batch] | None, name: str, max_rel: float) -> float:
    old, new = OnnxSession(before, 1), OnnxSession(after, 1)
    if batches is None:
        batches = [made_up_batch(old, seed) for seed in range(TRIALS)]
    parity = check_parity(old, new, batches)
    require_parity(parity, max_rel, what=f"the model after the pass {name!r}")
    return parity.max_rel
