"""What can be checked of a bundle, without trust in it; and what cannot, which is said."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fusepress.pipeline.bundling.archive import ArchiveError, unpack
from fusepress.pipeline.bundling.manifest import (
    ABOVE,
    MANIFEST_JSON,
    RELEASED,
    Manifest,
    faults,
    read_limited,
    read_manifest,
)
from fusepress.pipeline.bundling.signature import check_signature, fingerprint, load_public_key
from fusepress.pipeline.errors import FusepressError, StoreError, UsageError
from fusepress.pipeline.evidence import RunRecord, Verdict, read_run
from fusepress.pipeline.gates import judge, load_baseline, load_replicates, overall
from fusepress.pipeline.recipe import Recipe
from fusepress.pipeline.store import sha256_tree

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

Status = Literal["ok", "failed", "not checked"]

# of the largest reference output: the same file on another CPU adds up in another order
PARITY_RELATIVE = {"fp32": 1e-4, "fp16": 1e-2, "int8": 2e-2, "fp8": 5e-2}
SPOTS = 8  # faults that are named one by one


@dataclass(frozen=True, slots=True)
class Check:
    """One check, and what it found."""

    name: str
    status: Status
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """What was found of a bundle.

    Attributes:
        name: of the run.
        verdict: that the bundle states, judged again.
        checks: in order.
        not_checked: what no check here can tell.
    """

    name: str
    verdict: str
    checks: tuple[Check, ...]
    not_checked: tuple[str, ...] = field(default_factory=tuple)

    @property
    def ok(self) -> bool:
        """No check failed."""
        return all(check.status != "failed" for check in self.checks)


def verify_bundle(bundle: Path, *, key: Path | None = None) -> Verified:
    """Check a bundle.

    Args:
        bundle: the archive, or a folder that it was unpacked into.
        key: Ed25519 public key (PEM) that it must be signed with; without, a signature proves no origin.

    Raises:
        UsageError: there is no such file, or the key is none.
    """
    trusted = None if key is None else load_public_key(key)
    with tempfile.TemporaryDirectory(prefix="fusepress-") as scratch:
        try:
            folder = open_bundle(bundle, Path(scratch))
        except StoreError as error:
            return Verified(name=bundle.name, verdict="unknown", checks=(Check("container", "failed", str(error)),))
        return check_folder(folder, trusted)


def open_bundle(bundle: Path, scratch: Path) -> Path:
    """The folder of a bundle: unpacked into `scratch` where it is an archive.

    Raises:
        UsageError: there is no such file.
        StoreError: the archive is damaged; the message names the file at which.
    """
    if bundle.is_dir():
        return bundle
    if not bundle.is_file():
        raise UsageError(f"expected a bundle; got no file at {bundle}; correct the path")
    folder = scratch / "bundle"
    folder.mkdir()
    try:
        unpack(bundle, folder)
    except ArchiveError as error:
        raise StoreError(f"{error}, at {_entry_name(folder, error.index)}; fetch the bundle again") from error
    return folder


def _entry_name(folder: Path, index: int) -> str:
    """The file that should be entry `index`, from the manifest that came before it."""
    try:
        listed = sorted(read_manifest(folder).files)
    except StoreError:
        return MANIFEST_JSON if index == 0 else f"entry {index}"
    present = [name for name in ABOVE if (folder / name).is_file()]
    if index < len(present):
        return present[index]
    # whether there is a signature shows in what was unpacked before the fault
    place = index - len(present)
    if not any((folder / name).is_file() for name in listed) and len(present) < len(ABOVE) and index == len(present):
        return f"{ABOVE[index]} or {listed[0]}" if listed else ABOVE[index]
    return listed[place] if place < len(listed) else "its end"


def check_folder(folder: Path, trusted: Ed25519PublicKey | None) -> Verified:
    """Every check of an unpacked bundle. Those of the content are left out where the files are not the listed ones."""
    try:
        manifest = read_manifest(folder)
    except StoreError as error:
        return Verified(name=folder.name, verdict="unknown", checks=(Check("manifest", "failed", str(error)),))
    wrong = faults(folder, manifest)
    checks = [_hashes(manifest, wrong), guarded("signature", lambda: _signature(folder, manifest, trusted))]
    if wrong:
        return Verified(name=manifest.name, verdict=manifest.verdict, checks=tuple(checks))
    try:
        record = read_run(folder)
    except (FusepressError, OSError) as error:
        checks.append(Check("run record", "failed", str(error)))
        return Verified(name=manifest.name, verdict=manifest.verdict, checks=tuple(checks))
    lacking = [name for name in RELEASED if name not in record.artifacts]
    if lacking:
        why = f"expected {', '.join(RELEASED)} in run.json; got no {', '.join(lacking)}; fetch the bundle again"
        checks.append(Check("run record", "failed", why))
        return Verified(name=manifest.name, verdict=manifest.verdict, checks=tuple(checks))
    content: dict[str, Callable[[], Check]] = {
        "run record": lambda: _record(folder, manifest, record),
        "verdict": lambda: check_verdict(folder, record),
        "onnx": lambda: check_onnx(folder, manifest, record),
        "plan": lambda: _plan(folder, record),
    }
    checks += [guarded(name, check) for name, check in content.items()]
    refused = any(check.name == "onnx" and check.status != "ok" for check in checks)
    for name, reader in {"masks": _masks, "parity": _parity}.items():
        if refused:  # its readers follow paths that the check looks for
            checks.append(Check(name, "not checked", "an ONNX file that fails its check is not opened again"))
        else:
            checks.append(guarded(name, partial(reader, folder, record)))
    return Verified(
        name=manifest.name,
        verdict=manifest.verdict,
        checks=tuple(checks),
        not_checked=_beyond(record),
    )


def guarded(name: str, check: Callable[[], Check]) -> Check:
    """A check that meets what it did not expect has failed: a bundle may hold anything."""
    try:
        return check()
    except FusepressError as error:
        return Check(name, "failed", str(error))
    except Exception as error:  # noqa: BLE001  parsers of other libraries, on bytes of a stranger
        return Check(name, "failed", f"{type(error).__name__}: {str(error)[:300]}")


def _hashes(manifest: Manifest, wrong: dict[str, str]) -> Check:
    if not wrong:
        return Check("hashes", "ok", f"{len(manifest.files)} files are those of the manifest (SHA-256)")
    named = "; ".join(f"{name}: {reason}" for name, reason in list(wrong.items())[:SPOTS])
    more = f"; and {len(wrong) - SPOTS} more" if len(wrong) > SPOTS else ""
    return Check("hashes", "failed", f"{named}{more}; fetch the bundle again")


def _signature(folder: Path, manifest: Manifest, trusted: Ed25519PublicKey | None) -> Check:
    by = check_signature(folder, manifest.to_bytes(), trusted)
    if by is None:
        return Check("signature", "not checked", "the bundle is not signed")
    if trusted is None:
        why = f"whole, by the key {fingerprint(by)} that lies in the bundle; whose it is, --key PUBLIC.pem tells"
        return Check("signature", "not checked", why)
    return Check("signature", "ok", f"by the key {fingerprint(by)} that you gave")


def _record(folder: Path, manifest: Manifest, record: RunRecord) -> Check:
    told = (record.name, record.target, str(record.verdict), record.fusepress)
    if told != (manifest.name, manifest.target, manifest.verdict, manifest.fusepress):
        raise StoreError("expected run.json to tell what the manifest tells; got another name, target or verdict")
    for name, artifact in record.artifacts.items():
        path = _inside(folder, record, name)
        if not path.exists() or sha256_tree(path) != artifact.sha256:
            raise StoreError(f"expected the {name} that run.json names; got other bytes at {artifact.path}")
    return Check("run record", "ok", f"{len(record.artifacts)} artifacts are those that run.json names")


def _inside(folder: Path, record: RunRecord, name: str) -> Path:
    """An artifact's path, which a bundle may not lead out of itself."""
    path = folder / record.artifacts[name].path
    if not path.resolve().is_relative_to(folder.resolve()):
        raise StoreError(f"expected the {name} within the bundle; got the path {record.artifacts[name].path!r}")
    return path


def bundled_recipe(folder: Path) -> Recipe:
    """The bundled recipe, read as JSON alone: YAML could hold a small text that is a huge value.

    Raises:
        StoreError: it is missing or no recipe.
    """
    path = folder / "recipe.json"
    try:
        return Recipe.model_validate_json(read_limited(path))
    except (OSError, ValueError) as error:
        raise StoreError(
            f"expected the resolved recipe; got {str(error).splitlines()[0]} at {path.name}; run compress again"
        ) from error


def check_verdict(folder: Path, record: RunRecord) -> Check:
    """Judge a run folder or bundle again, from its stored replicates, by the gates of its own recipe.json.

    Raises:
        StoreError: that gives other verdicts than run.json tells.
    """
    gates = bundled_recipe(folder).gates
    replicates = load_replicates(_inside(folder, record, "replicates"))
    baseline = load_baseline(folder / "baseline.json") if gates.release is not None else None
    again = judge(record, replicates, gates, record.task["metrics"], baseline=baseline)
    stored = [verdict for stage in record.stages for verdict in stage.verdicts]
    told, found = ({v.gate: v for v in some} for some in (stored, again))
    differing = sorted(g for g in told.keys() | found.keys() if _differ(told.get(g), found.get(g)))
    verdict, why = overall(again)
    if differing or len(stored) != len(again) or verdict != record.verdict:
        differing = differing or ["the whole"]
        raise StoreError(
            f"expected the verdicts that the stored figures give; got others at {', '.join(differing[:SPOTS])}: judged "
            f"again it is {verdict}, run.json says {record.verdict}; run `fusepress gate RUN` "
            "without -o before the run is bundled"
        )
    return Check("verdict", "ok", f"{verdict} again from the stored replicates: {why[:160]}")


def _differ(told: Verdict | None, found: Verdict | None) -> bool:
    """Another verdict, limit or figure, but for the last digits, which belong to a machine's arithmetic."""
    if told is None or found is None or told.verdict != found.verdict:
        return True
    pairs = [(getattr(told, name), getattr(found, name)) for name in ("limit", "value", "low", "high")]
    return any(a != b if None in (a, b) else not math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9) for a, b in pairs)


def check_onnx(folder: Path, manifest: Manifest, record: RunRecord) -> Check:
    """Every ONNX file, and the released one whatever its name is.

    Raises:
        StoreError: a file has weights outside of it; the checker raises errors of its own.
    """
    import onnx

    released = _inside(folder, record, "onnx").resolve().relative_to(folder.resolve()).as_posix()
    files = sorted({released, *(name for name in manifest.files if name.endswith(".onnx"))})
    for name in files:
        proto = onnx.load(str(folder / name), load_external_data=False)
        tensors = [m for m in _messages(proto) if isinstance(m, onnx.TensorProto)]
        outside = [t.name for t in tensors if t.data_location == onnx.TensorProto.EXTERNAL or t.external_data]
        if outside:
            raise StoreError(
                f"expected weights within the file; got {outside[0]!r} outside of it at {name}; do not use it"
            )
        onnx.checker.check_model(proto, full_check=True)
    return Check("onnx", "ok", f"{len(files)} files pass the ONNX checker with shape inference")


def _messages(message: Any) -> Iterator[Any]:
    """A protobuf message and every one within it: tensors also of sparse weights, inner graphs and functions."""
    yield message
    for slot, value in message.ListFields():
        if slot.message_type is not None:
            for inner in [value] if hasattr(value, "ListFields") else value:
                yield from _messages(inner)


def _plan(folder: Path, record: RunRecord) -> Check:
    """The weights have at least the channels that the plan keeps (layers that join groups have more)."""
    from safetensors import safe_open

    from fusepress.pipeline.graph.plan import PrunePlan

    if "plan" not in record.artifacts or "checkpoint" not in record.artifacts:
        return Check("plan", "not checked", "the run did not prune")
    plan = PrunePlan.read(_inside(folder, record, "plan"))
    kept: dict[tuple[str, int], int] = {}
    for group in plan.groups:
        for member in group.members:
            channels = len(group.kept or group.stand_in) * member.stride
            kept[member.param, member.dim] = kept.get((member.param, member.dim), 0) + channels
    with safe_open(_inside(folder, record, "checkpoint"), framework="numpy") as weights:
        names = set(weights.keys())
        for (param, dim), channels in kept.items():
            if param not in names:
                raise StoreError(f"expected the parameter {param!r} that the plan names; got none in the checkpoint")
            size = weights.get_slice(param).get_shape()[dim]
            if size < channels:
                raise StoreError(f"expected {channels} channels of {param!r} (dimension {dim}); got {size}")
    return Check("plan", "ok", f"the checkpoint has the channels that the plan keeps of {len(plan.groups)} groups")


def _masks(folder: Path, record: RunRecord) -> Check:
    """Masked weights are zero, and a 2:4 release has layers of that pattern."""
    from safetensors.numpy import load_file

    if "masks" not in record.artifacts:
        return Check("masks", "not checked", "the run did not sparsify")
    masks = load_file(_inside(folder, record, "masks"))
    weights = load_file(_inside(folder, record, "checkpoint"))
    for name, mask in masks.items():
        if name not in weights or weights[name].shape != mask.shape:
            raise StoreError(
                f"expected a weight of shape {mask.shape} for the mask {name!r}; got none in the checkpoint"
            )
        revived = int(np.count_nonzero(weights[name][mask == 0]))
        if revived:
            raise StoreError(f"expected masked weights to be zero; got {revived} others in {name!r}")
    note = ""
    if bundled_recipe(folder).wants_2to4:
        from fusepress.export.sparsity import check_sparsity_2to4

        found = len(check_sparsity_2to4(_inside(folder, record, "onnx")).valid_layers)
        if found == 0:
            raise StoreError("expected layers with the 2:4 pattern in the released ONNX; got none")
        note = f"; {found} layers of the released ONNX are 2:4"
    return Check("masks", "ok", f"{len(masks)} masks hold in the checkpoint{note}")


def _parity(folder: Path, record: RunRecord) -> Check:
    """The released ONNX gives the reference outputs from the reference inputs, on ONNX Runtime here."""
    from safetensors.numpy import load_file

    from fusepress.export.runtime import OnnxSession

    tensors = load_file(_inside(folder, record, "references"))
    inputs = {name.removeprefix("inputs/"): t for name, t in tensors.items() if name.startswith("inputs/")}
    expected = {name.removeprefix("outputs/"): t for name, t in tensors.items() if name.startswith("outputs/")}
    samples = min((len(tensor) for tensor in inputs.values()), default=0)
    if samples == 0 or not all(reference.size and np.isfinite(reference).all() for reference in expected.values()):
        raise StoreError(
            "expected finite reference outputs of at least one sample; got none, NaN or infinity at "
            f"{record.artifacts['references'].path}; run compress again from verify"
        )
    integer_kernels = record.target_profile.get("family") == "host"
    session = OnnxSession(_inside(folder, record, "onnx"), integer_kernels=integer_kernels)
    found = session.run_numpy(inputs)
    if set(found) != set(expected) or not expected:
        raise StoreError(f"expected the outputs {sorted(expected)}; got {sorted(found)} from the released ONNX")
    limit = PARITY_RELATIVE[record.final_precision or "fp32"]
    worst = 0.0
    for name, reference in expected.items():
        if found[name].shape != reference.shape or not np.isfinite(found[name]).all():
            raise StoreError(f"expected {name!r} of shape {reference.shape}, finite; got {found[name].shape}")
        largest = max(float(np.abs(reference).max(initial=0.0)), 1e-12)
        away = np.abs(found[name].astype(np.float64) - reference)
        worst = max(worst, float(away.max(initial=0.0)) / largest)
    if worst > limit:
        raise StoreError(f"expected the reference outputs within {limit:g} of the largest; got {worst:.2g} away")
    return Check(
        "parity", "ok", f"reference outputs of {samples} samples again, at most {worst:.2g} of the largest away"
    )


def _beyond(record: RunRecord) -> tuple[str, ...]:
    """What no file can prove."""
    notes = [
        "that the figures are of the data they name: neither data nor task are in the bundle (see reproduce)",
        "latencies, which belong to the machine they were measured or predicted for",
        "figures that no gate reads, and reports: hashed here, not compared with the replicates",
        "that the released ONNX was exported from the checkpoint beside it (see reproduce)",
    ]
    if "engine" in record.artifacts:
        notes.append("the engine: it is compiled code, hashed here and not loaded")
    if "build_kit" in record.artifacts:
        notes.append("the build kit's scripts: hashed here and not run")
    return tuple(notes)


def to_json(found: Verified) -> str:
    """As outside tools read it."""
    checks = [{"name": c.name, "status": c.status, "why": c.why} for c in found.checks]
    plain = {"schema": 1, "name": found.name, "verdict": found.verdict, "ok": found.ok}
    return json.dumps(plain | {"checks": checks, "not_checked": list(found.not_checked)}, indent=1)
