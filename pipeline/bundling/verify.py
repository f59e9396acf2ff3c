"""What can be checked of a bundle, without trust in it; and what cannot, which is said."""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusepress.pipeline.bundling.archive import ArchiveError, unpack
from fusepress.pipeline.bundling.check import Check, guarded, within
from fusepress.pipeline.bundling.manifest import (
    ABOVE,
    MANIFEST_JSON,
    RELEASED,
    Manifest,
    faults,
    read_limited,
    read_manifest,
)
from fusepress.pipeline.bundling.model import CHECKS, check_models
from fusepress.pipeline.bundling.signature import check_signature, fingerprint, load_public_key
from fusepress.pipeline.errors import EXIT_STAGE_FAILED, FusepressError, StoreError, UsageError
from fusepress.pipeline.evidence import RunRecord, Verdict, read_run
from fusepress.pipeline.gates import FailOn, judge, load_baseline, load_replicates, overall
from fusepress.pipeline.gates import exit_code as verdict_exit_code
from fusepress.pipeline.recipe import Recipe
from fusepress.pipeline.store import sha256_file, sha256_tree

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

RECIPE_JSON = "recipe.json"
SPOTS = 8  # faults that are named one by one


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
    checks.append(guarded("run record", lambda: _record(folder, manifest, record)))
    checks.append(guarded("verdict", lambda: check_verdict(folder, record)))
    models = _models(folder, manifest, record)
    plan = guarded("plan", lambda: _plan(folder, record))
    checks += [models["onnx"], plan, models["masks"], models["parity"]]
    return Verified(
        name=manifest.name,
        verdict=manifest.verdict,
        checks=tuple(checks),
        not_checked=_beyond(record),
    )


def _models(folder: Path, manifest: Manifest, record: RunRecord) -> dict[str, Check]:
    try:
        return check_models(folder, manifest, record, wants_2to4=bundled_recipe(folder).wants_2to4)
    except FusepressError as error:
        return {name: Check(name, "failed", str(error)) for name in CHECKS}


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
    wrong = changed(record, folder)
    if wrong is not None:
        name, path = wrong
        raise StoreError(f"expected the {name} that run.json names; got other bytes at {path.relative_to(folder)}")
    files = sum(len(stage.files) for stage in record.stages)
    return Check(
        "run record", "ok", f"{len(record.artifacts)} artifacts and {files} files of stages are those it names"
    )


def changed(record: RunRecord, folder: Path) -> tuple[str, Path] | None:
    """The first file of a stage, recipe.json or artifact that is not as the record names it; its name and path.

    Raises:
        StoreError: a path leads out of the folder.
    """
    files = {f"{stage.name}/{name}": sha for stage in record.stages for name, sha in stage.files.items()}
    if record.recipe_json_sha256 is not None:
        files[RECIPE_JSON] = record.recipe_json_sha256
    for relative, sha in files.items():
        path = within(folder, relative, "file")
        if not path.is_file() or sha256_file(path) != sha:
            return path.name, path
    for name, artifact in record.artifacts.items():  # those of runs of before are named here alone
        path = _inside(folder, record, name)
        if not path.exists() or sha256_tree(path) != artifact.sha256:
            return name, path
    return None


def _inside(folder: Path, record: RunRecord, name: str) -> Path:
    return within(folder, record.artifacts[name].path, name)


def bundled_recipe(folder: Path) -> Recipe:
    """The bundled recipe, read as JSON alone: YAML could hold a small text that is a huge value.

    Raises:
        StoreError: it is missing or no recipe.
    """
    path = folder / RECIPE_JSON
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


def exit_code(found: Verified, fail_on: FailOn = "inconclusive") -> int:
    """5 where a check failed; else that of the verdict that the bundle tells, which was judged again.

    Args:
        found: what was checked.
        fail_on: the mildest verdict that does not give 0.
    """
    if not found.ok:
        return EXIT_STAGE_FAILED
    verdict: Any = found.verdict
    return verdict_exit_code(verdict, fail_on)


def to_json(found: Verified) -> str:
    """As outside tools read it."""
    checks = [{"name": c.name, "status": c.status, "why": c.why} for c in found.checks]
    plain = {"schema": 1, "name": found.name, "verdict": found.verdict, "ok": found.ok}
    return json.dumps(plain | {"checks": checks, "not_checked": list(found.not_checked)}, indent=1)
