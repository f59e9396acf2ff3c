"""The checks that open a bundle's ONNX files, in a process of their own with a limit of time and of memory.

A graph can be valid and still take for ever, or all memory; and the parsers of other libraries may crash on it. What
happens there costs the check, not the caller.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fusepress.pipeline.bundling.check import Check, guarded, within
from fusepress.pipeline.bundling.manifest import Manifest
from fusepress.pipeline.errors import StoreError
from fusepress.pipeline.evidence import RunRecord

TIMEOUT_S = 600.0
MEMORY_BYTES = 8 << 30
MEMORY_A_BYTE = 8  # of the released file more
CHECKS = ("onnx", "masks", "parity")
WARM = ("numpy", "onnx", "onnxruntime")
# of the largest reference output: the same file on another CPU adds up in another order
PARITY_RELATIVE = {"fp32": 1e-4, "fp16": 1e-2, "int8": 2e-2, "fp8": 5e-2}

Job = Mapping[str, Any]


def check_models(
    folder: Path,
    manifest: Manifest,
    record: RunRecord,
    *,
    wants_2to4: bool = False,
    checks: tuple[str, ...] = CHECKS,
    timeout_s: float = TIMEOUT_S,
    memory_bytes: int = MEMORY_BYTES,
) -> dict[str, Check]:
    """Check the ONNX files of an unpacked bundle, whose hashes were checked.

    Args:
        folder: the bundle.
        manifest: its list of files.
        record: its run.
        wants_2to4: the recipe's `sparsify.pattern` is 2:4.
        checks: onnx (the files are valid and hold their weights), masks, parity (with the reference outputs).
        timeout_s: for all of them.
        memory_bytes: of the process, beside that for the released file itself.

    Raises:
        StoreError: a path leads out of the bundle.
    """
    from fusepress.export.worker import run_job

    job = _job(folder, manifest, record, wants_2to4) | {"checks": checks}
    released = within(folder, record.artifacts["onnx"].path, "onnx")
    job["memory_limit"] = memory_bytes + MEMORY_A_BYTE * released.stat().st_size
    with tempfile.TemporaryDirectory(prefix="fusepress-") as scratch:
        outcome, result = run_job(__name__, job, log=Path(scratch) / "log", timeout_s=timeout_s, warm=WARM)
    done = {name: Check(name, *found) for name, found in (result or {}).items()}
    missing = [name for name in checks if name not in done]
    if missing:
        limits = f"{timeout_s:g} s and {job['memory_limit'] / 2**30:.3g} GiB"
        why = f"expected an answer within {limits}; got {outcome.says(timeout_s)}; do not use the bundle"
        done[missing[0]] = Check(missing[0], "failed", why)
    return done | {name: Check(name, "not checked", _AFTER) for name in missing[1:]}


_AFTER = "an ONNX file that fails its check is not opened again"


def _job(folder: Path, manifest: Manifest, record: RunRecord, wants_2to4: bool) -> dict[str, Any]:
    paths = {name: within(folder, artifact.path, name) for name, artifact in record.artifacts.items()}
    released = paths["onnx"].resolve().relative_to(folder.resolve()).as_posix()
    export = record.stage("export")
    sparsity = {} if export is None else export.details.get("sparsity", {})
    return {
        "folder": str(folder.resolve()),
        "files": sorted({released, *(name for name in manifest.files if name.endswith(".onnx"))}),
        "paths": {name: str(path) for name, path in paths.items()},
        "sparsity": sparsity if wants_2to4 else None,
        "precision": record.final_precision or "fp32",
        "integer_kernels": record.target_profile.get("family") == "host",
    }


# ------------------------------------------------------------------------------------------------------- in the process


def check_onnx(job: Job) -> Check:
    """Every ONNX file, and the released one whatever its name is.

    Raises:
        StoreError: a file has weights outside of it; the checker raises errors of its own.
    """
    import onnx

    for name in job["files"]:
        proto = onnx.load(str(Path(job["folder"]) / name), load_external_data=False)
        tensors = [m for m in _messages(proto) if isinstance(m, onnx.TensorProto)]
        outside = [t.name for t in tensors if t.data_location == onnx.TensorProto.EXTERNAL or t.external_data]
        if outside:
            raise StoreError(
                f"expected weights within the file; got {outside[0]!r} outside of it at {name}; do not use it"
            )
        onnx.checker.check_model(proto, full_check=True)
    return Check("onnx", "ok", f"{len(job['files'])} files pass the ONNX checker with shape inference")


def _messages(message: Any) -> Iterator[Any]:
    """A protobuf message and every one within it: tensors also of sparse weights, inner graphs and functions."""
    yield message
    for slot, value in message.ListFields():
        if slot.message_type is not None:
            for inner in [value] if hasattr(value, "ListFields") else value:
                yield from _messages(inner)


def check_masks(job: Job) -> Check:
    """Masked weights are zero, and a 2:4 release has the pattern in each layer that run.json says has it."""
    from safetensors.numpy import load_file

    if "masks" not in job["paths"]:
        return Check("masks", "not checked", "the run did not sparsify")
    masks = load_file(job["paths"]["masks"])
    weights = load_file(job["paths"]["checkpoint"])
    for name, mask in masks.items():
        if name not in weights or weights[name].shape != mask.shape:
            raise StoreError(
                f"expected a weight of shape {mask.shape} for the mask {name!r}; got none in the checkpoint"
            )
        revived = int(np.count_nonzero(weights[name][mask == 0]))
        if revived:
            raise StoreError(f"expected masked weights to be zero; got {revived} others in {name!r}")
    note = (
        "" if job["sparsity"] is None else f"; {_confirmed_2to4(job, list(masks))} layers of the released ONNX are 2:4"
    )
    return Check("masks", "ok", f"{len(masks)} masks hold in the checkpoint{note}")


def _confirmed_2to4(job: Job, masked: list[str]) -> int:
    from fusepress.export.sparsity import check_sparsity_2to4, masked_layers_2to4

    told: Mapping[str, Any] = job["sparsity"]
    if not {"masked_confirmed", "masked_not_exported"} <= told.keys():
        raise StoreError("expected run.json to tell which layers are 2:4; got none at its stage export; do not use it")
    found = masked_layers_2to4(check_sparsity_2to4(Path(job["paths"]["onnx"])), masked)
    valid = [param for param, status in found.items() if status == "valid"]
    lost = sorted(found.keys() - {*valid, *told["masked_not_exported"]})
    if lost or len(valid) != told["masked_confirmed"] or not valid:
        which = f", not in {lost[0]!r}" if lost else ""
        raise StoreError(
            f"expected the 2:4 pattern in the {told['masked_confirmed']} masked layers that run.json tells; got it in "
            f"{len(valid)}{which}, at {Path(job['paths']['onnx']).name}; do not use it"
        )
    return len(valid)


def check_parity(job: Job) -> Check:
    """The released ONNX gives the reference outputs from the reference inputs, on ONNX Runtime here."""
    from safetensors.numpy import load_file

    from fusepress.export.runtime import OnnxSession

    tensors = load_file(job["paths"]["references"])
    inputs = {name.removeprefix("inputs/"): t for name, t in tensors.items() if name.startswith("inputs/")}
    expected = {name.removeprefix("outputs/"): t for name, t in tensors.items() if name.startswith("outputs/")}
    samples = min((len(tensor) for tensor in inputs.values()), default=0)
    if samples == 0 or not all(reference.size and np.isfinite(reference).all() for reference in expected.values()):
        raise StoreError(
            "expected finite reference outputs of at least one sample; got none, NaN or infinity at "
            f"{Path(job['paths']['references']).name}; run compress again from verify"
        )
    session = OnnxSession(Path(job["paths"]["onnx"]), integer_kernels=job["integer_kernels"])
    found = session.run_numpy(inputs)
    if set(found) != set(expected) or not expected:
        raise StoreError(f"expected the outputs {sorted(expected)}; got {sorted(found)} from the released ONNX")
    worst = max(_away(name, found[name], reference) for name, reference in expected.items())
    limit = PARITY_RELATIVE[job["precision"]]
    if worst > limit:
        raise StoreError(f"expected the reference outputs within {limit:g} of the largest; got {worst:.2g} away")
    return Check(
        "parity", "ok", f"reference outputs of {samples} samples again, at most {worst:.2g} of the largest away"
    )


def _away(name: str, found: Any, reference: Any) -> float:
    if found.shape != reference.shape or not np.isfinite(found).all():
        raise StoreError(f"expected {name!r} of shape {reference.shape}, finite; got {found.shape}")
    largest = max(float(np.abs(reference).max(initial=0.0)), 1e-12)
    return float(np.abs(found.astype(np.float64) - reference).max(initial=0.0)) / largest


READERS: dict[str, Callable[[Job], Check]] = {"onnx": check_onnx, "masks": check_masks, "parity": check_parity}


def main() -> None:
    """Answer after each check, so that one that ends the process does not take those before it."""
    from fusepress.export.worker import answer, read_job

    job = read_job()
    done: dict[str, tuple[str, str]] = {}
    for name in job["checks"]:
        check = guarded(name, lambda name=name: READERS[name](job))  # type: ignore[misc]
        done[name] = (check.status, check.why)
        if name == "onnx" and check.status != "ok":  # the other readers follow paths that this check looks for
            done |= {other: ("not checked", _AFTER) for other in job["checks"] if other not in done}
            answer(job, done)
            return
        answer(job, done)


if __name__ == "__main__":
    main()
