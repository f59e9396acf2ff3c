"""Why a run's release is not faster: from its ONNX, the builder's list of layers and a profile of the device.

Where the target is this machine's CPU, the file is run and profiled here instead.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from fusepress.pipeline.errors import StoreError, TargetError, UsageError
from fusepress.pipeline.evidence import RunRecord, read_run
from fusepress.pipeline.report.explain import EXPLAIN_JSON
from fusepress.pipeline.store import atomic_write_text
from fusepress.targets.profile import Profile, load_profile

if TYPE_CHECKING:
    from fusepress.export.explain import Explanation
    from fusepress.export.inspector import EngineLayer


def explain_run(
    folder: Path,
    *,
    layers: Path | None = None,
    profile: Path | None = None,
    target: str | None = None,
    mode: str | None = None,
) -> Explanation:
    """Explain a run's released model and keep the findings in its folder, for the report.

    Args:
        folder: a run folder with an ONNX artifact.
        layers: the builder's list, in place of the run's own: JSON of trtexec --exportLayerInfo, or a verbose log.
        profile: times of the layers, of trtexec --exportProfile on the device.
        target: a profile, in place of the run's; needed where that was a YAML file that is elsewhere now.
        mode: power mode, in place of the run's (or of the named target's default).

    Raises:
        StoreError: the run has no ONNX artifact.
        BuildError: a file is missing or is not what it should be.
        TargetError: the target's profile is not found.
    """
    record = read_run(folder)
    if "onnx" not in record.artifacts:
        raise StoreError(f"expected a run with an ONNX artifact; got none at {folder}; run fusepress compress first")
    found = _explain(
        folder / record.artifacts["onnx"].path,
        _profile_of(record, target),
        precision=record.final_precision,
        mode=mode or (record.target_profile.get("power_mode") if target is None else None),
        layers=_own_layers(folder) if layers is None else _read_layers(layers),
        times=profile,
    )
    atomic_write_text(folder / EXPLAIN_JSON, json.dumps(found.to_dict(), indent=1) + "\n")
    return found


def explain_onnx(
    path: Path, *, target: str | None, precision: str | None, layers: Path | None = None, profile: Path | None = None
) -> Explanation:
    """Explain an ONNX file on a target; nothing is written.

    Raises:
        UsageError: no target was named.
        BuildError, TargetError: as `explain_run`.
    """
    if target is None:
        raise UsageError(f"expected --target for the ONNX file {path}; got none; name a profile of `targets ls`")
    listed = () if layers is None else _read_layers(layers)
    return _explain(path, load_profile(target), precision=precision, mode=None, layers=listed, times=profile)


def _explain(
    path: Path,
    target: Profile,
    *,
    precision: str | None,
    mode: str | None,
    layers: tuple[EngineLayer, ...],
    times: Path | None,
) -> Explanation:
    from fusepress.export.explain import explain_model
    from fusepress.export.inspector import parse_profile

    if target.family == "host":
        return _explain_here(path, target, given=bool(layers) or times is not None)
    if times is not None and not times.is_file():
        raise UsageError(f"expected the profile of trtexec --exportProfile; got no file at {times}; correct the path")
    profile = parse_profile(times.read_text(errors="replace"), where=str(times)) if times is not None else {}
    return explain_model(path, target, precision=precision, mode=mode, layers=layers, times_ms=profile)


def _explain_here(path: Path, target: Profile, *, given: bool) -> Explanation:
    """ONNX Runtime on this machine's CPU: there is no engine to ask, and nothing to predict."""
    from fusepress.export.explain_host import explain_on_host

    if given:
        raise UsageError(
            f"expected no --layers or --profile for {target.name}, which has no engine; got some; leave them out: "
            "ONNX Runtime is profiled here"
        )
    return explain_on_host(path, target)


def _read_layers(path: Path) -> tuple[EngineLayer, ...]:
    from fusepress.export.inspector import read_layers

    return read_layers(path)


def _own_layers(folder: Path) -> tuple[EngineLayer, ...]:
    """What the run's own builder said: the inspector's JSON, else its log; none where it listed no layers."""
    from fusepress.export.inspector import parse_layers

    for path in sorted((folder / "build").glob("*.layers.json")):
        return _read_layers(path)
    logs = sorted((folder / "build").glob("*.log"))
    return parse_layers(logs[0].read_text(errors="replace")) if logs else ()


def _profile_of(record: RunRecord, target: str | None) -> Profile:
    name = target or record.target
    try:
        return load_profile(name)
    except TargetError as error:
        if target is not None:
            raise
        raise TargetError(
            f"expected the profile of the run's target; got {name!r}, which is not one that ships ({error}); name its "
            "YAML file with --target"
        ) from error
