"""The build kit: what a Jetson or DRIVE computer needs to build the engine, time it and check it, by itself.

Engines are not portable across platforms, so none is built here. The commands are those of trtexec for the named
TensorRT version.
"""

from __future__ import annotations

import json
import shlex
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fusepress.export.onnx import describe_onnx, load_onnx, opset_of
from fusepress.pipeline.errors import ExportError
from fusepress.pipeline.store import disk_error, sha256_file
from fusepress.targets.profile import Profile
from fusepress.targets.trtexec_command import tensorrt_version, trtexec_bench, trtexec_build, trtexec_profile

if TYPE_CHECKING:
    from torch import Tensor

Array = np.ndarray[Any, Any]
Reference = tuple[Mapping[str, "Tensor"], Mapping[str, "Tensor"]]
MANIFEST = "kit.json"
# newest operator set that the importer of a TensorRT version reads (onnx-tensorrt's release notes)
OPSET_LIMITS = (((8, 99), 17), ((10, 8), 20), ((10, 12), 22), ((99, 0), 24))
TOLERANCE = {"fp32": 1e-3, "fp16": 2e-2, "int8": 2e-1, "fp8": 2e-1}


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildKit:
    """A kit on disk.

    Attributes:
        path: its folder.
        target: name of the target's profile.
        tensorrt: version that its commands are for.
        power_mode: mode that the latency is judged in.
        precision: of the model.
        files: relative path -> sha256, every file but the manifest.
        notes: what was not tried.
    """

    path: Path
    target: str
    tensorrt: str
    power_mode: str
    precision: str
    files: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "schema": 1,
            "built": False,
            "target": self.target,
            "tensorrt": self.tensorrt,
            "power_mode": self.power_mode,
            "precision": self.precision,
            "notes": list(self.notes),
            "files": self.files,
        }


def write_build_kit(
    folder: Path,
    onnx_path: Path,
    profile: Profile,
    *,
    power_mode: str | None,
    precision: str,
    references: Sequence[Reference] = (),
    sparse: bool = False,
    dense_onnx: Path | None = None,
    tensorrt: str | None = None,
) -> BuildKit:
    """Write a folder to copy to the device; the same arguments give the same bytes.

    Args:
        folder: new folder, or one that an earlier kit is in.
        onnx_path: the released model.
        profile: the target; its first TensorRT version counts unless `tensorrt` says otherwise.
        power_mode: mode that the latency is judged in; None for the profile's default.
        precision: of the model: fp32, fp16, int8 or fp8.
        references: (inputs, outputs) of the model on ONNX Runtime, one sample each; outputs may be empty.
        sparse: the weights are 2:4: sparse kernels are allowed, and an engine without them is built to compare.
        dense_onnx: the uncompressed model, to time beside it.
        tensorrt: version on the device.

    Raises:
        ExportError: TensorRT of that version cannot read the model, a reference does not fit it, or `folder` holds
            something else.
    """
    version = tensorrt or profile.software[0].tensorrt
    mode = power_mode or profile.default_mode
    proto = load_onnx(onnx_path)
    _check_opset(opset_of(proto), version, onnx_path)
    if folder.exists() and any(folder.iterdir()) and not (folder / MANIFEST).is_file():
        raise ExportError(f"expected an empty folder for the build kit; got other files at {folder}; name another")
    aside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    try:
        aside.mkdir(parents=True)
        shutil.copyfile(onnx_path, aside / "model.onnx")
        if dense_onnx is not None:
            shutil.copyfile(dense_onnx, aside / "dense.onnx")
        listed = write_references(aside, references, onnx_path, major=tensorrt_version(version)[0])
        plans = _plans(sparse=sparse, dense=dense_onnx is not None)
        notes = _notes(profile, version, sparse=sparse)
        texts = {
            "build.sh": _build_script(plans, version, precision),
            "bench.sh": _bench_script(plans, version, mode, listed, TOLERANCE[precision]),
            "check.py": _CHECK,
            "references.json": json.dumps(listed, indent=1) + "\n",
            "README.md": _readme(profile, version, mode, precision, plans, notes, TOLERANCE[precision]),
        }
        for name, text in texts.items():
            (aside / name).write_text(text)
            (aside / name).chmod(0o755 if name.endswith((".sh", ".py")) else 0o644)
        files = {p.relative_to(aside).as_posix(): sha256_file(p) for p in sorted(aside.rglob("*")) if p.is_file()}
        kit = BuildKit(
            path=folder,
            target=profile.name,
            tensorrt=version,
            power_mode=mode,
            precision=precision,
            files=files,
            notes=notes,
        )
        (aside / MANIFEST).write_text(json.dumps(kit.to_dict(), indent=1) + "\n")
        if folder.exists():
            shutil.rmtree(folder)
        aside.rename(folder)
    except OSError as error:
        raise disk_error(error, folder) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return kit


def _check_opset(opset: int, version: str, path: Path) -> None:
    limit = next(limit for last, limit in OPSET_LIMITS if tensorrt_version(version) <= last)
    if opset > limit:
        raise ExportError(
            f"expected at most operator set {limit}, which TensorRT {version} reads; got {opset} at {path}; "
            "export with that opset, and quantise with remainder fp32"
        )


def _plans(*, sparse: bool, dense: bool) -> list[tuple[str, str, bool]]:
    """(ONNX, plan, sparse kernels allowed)."""
    plans = [("model.onnx", "model.plan", sparse)]
    if sparse:
        plans.append(("model.onnx", "model_without_sparse_kernels.plan", False))
    if dense:
        plans.append(("dense.onnx", "dense.plan", False))
    return plans


def write_references(
    folder: Path, references: Sequence[Reference], onnx_path: Path, *, major: int
) -> list[dict[str, Any]]:
    """Write inputs and outputs as raw little-endian files, and list them as `references.json` does.

    Args:
        folder: where `references/` goes.
        references: (inputs, outputs) of the model, one sample each; outputs may be empty.
        onnx_path: the model.
        major: of TensorRT; before 10 it binds int64 as int32.

    Raises:
        ExportError: an input is missing, or a tensor has another shape than the model's.
    """
    info = describe_onnx(onnx_path)
    listed = []
    for index, (inputs, outputs) in enumerate(references):
        missing = [name for name in info.inputs if name not in inputs]
        if missing:
            raise ExportError(
                f"expected reference inputs {list(info.inputs)}; got {list(inputs)}, without {missing}; "
                "take them from the task's batches"
            )
        entry: dict[str, Any] = {"inputs": [], "outputs": []}
        for kind, shapes, tensors in (("inputs", info.inputs, inputs), ("outputs", info.outputs, outputs)):
            for position, (name, shape) in enumerate(shapes.items()):
                if name not in tensors:
                    continue
                array = _reference_array(name, tensors[name].detach().cpu().numpy(), shape, major)
                file = f"references/{index}_{kind[:-1]}_{position}.bin"
                (folder / "references").mkdir(exist_ok=True)
                (folder / file).write_bytes(np.ascontiguousarray(array).tobytes())
                entry[kind].append({"name": name, "shape": list(shape), "type": str(array.dtype), "file": file})
        listed.append(entry)
    return listed


def _reference_array(name: str, array: Array, shape: tuple[int, ...], major: int) -> Array:
    if array.shape != shape:
        raise ExportError(
            f"expected a reference of shape {shape} for {name!r}; got {array.shape}; give one sample with batch 1"
        )
    if array.dtype == np.int64 and major < 10:  # these versions bind int64 inputs as int32
        return array.astype(np.int32)
    return array


def _notes(profile: Profile, version: str, *, sparse: bool) -> tuple[str, ...]:
    notes = [f"No engine was built, and nothing here ran on {profile.name}."]
    if tensorrt_version(version)[0] < 10:
        notes.append(
            f"TensorRT {version} has no strong typing: --fp16 and --int8 allow these precisions beside the Q/DQ of the "
            "file, and the builder then chooses. Not tried."
        )
    if sparse:
        notes.append(
            "The weights are 2:4. Whether TensorRT picks sparse kernels, and whether they are faster, shows in the log "
            "of the build: search it for (Sparsity)."
        )
    if not profile.software[0].confirmed:
        notes.append("The TensorRT version of this platform is recalled, not confirmed.")
    return tuple(notes)


_HEAD = """#!/usr/bin/env bash
# {what}
set -euo pipefail
cd "$(dirname "$0")"
TRTEXEC="${{TRTEXEC:-$(command -v trtexec || echo /usr/src/tensorrt/bin/trtexec)}}"
[ -x "$TRTEXEC" ] || {{ echo "expected trtexec; got none at $TRTEXEC; set TRTEXEC=/path/to/trtexec" >&2; exit 2; }}
# the flags below are for TensorRT {version}: another major version means something else by them
found="$("$TRTEXEC" --help 2>/dev/null | grep -oE 'TensorRT v[0-9]+' | head -n 1 | grep -oE '[0-9]+$' || true)"
case "$found" in
  {pattern}) ;;
  *) echo "expected TensorRT {major}; got ${{found:-an unknown version}}; make a kit for it, or set ANY_VERSION=1" >&2
     [ "${{ANY_VERSION:-0}}" = 1 ] || exit 2 ;;
esac
"""


def _head(what: str, version: str) -> str:
    major = tensorrt_version(version)[0]
    # the banner writes 8.5.2 as v8502, 10.3.0 as v100300
    pattern = f"{major}[0-9][0-9][0-9]" if major < 10 else f"{major}[0-9][0-9][0-9][0-9]"
    return _HEAD.format(what=what, version=version, major=major, pattern=pattern)


def _command(arguments: Sequence[str], log: str) -> str:
    # names of inputs come from the model, and may hold anything
    call = '"$TRTEXEC" \\\n  ' + " \\\n  ".join(map(shlex.quote, arguments))
    return f"{call} \\\n  > {log} 2>&1 || {{ tail -n 20 {log}; exit 1; }}\n"


def _build_script(plans: Sequence[tuple[str, str, bool]], version: str, precision: str) -> str:
    text = _head(f"Build the engine(s) on the device itself, with TensorRT {version}.", version)
    for onnx, plan, sparse in plans:
        log = f"{Path(plan).stem}.build.log"
        # the dense model carries its own precision: FP16, also where the released one is INT8
        flags = "fp16" if onnx == "dense.onnx" and precision == "int8" else precision
        text += f'\necho "building {plan}: minutes"\n'
        text += _command(trtexec_build(onnx, plan, version, flags, sparse=sparse), log)
        text += f'grep "(Sparsity)" {log} || true\n' if sparse else ""
    return text


def _bench_script(
    plans: Sequence[tuple[str, str, bool]],
    version: str,
    mode: str,
    listed: Sequence[Mapping[str, Any]],
    tolerance: float,
) -> str:
    text = _head("Time the engine(s) and check them against the references.", version)
    text += f"""
# the latency is judged in this power mode: the device's is recorded here and never changed
mode={shlex.quote(mode)}
{{ nvpmodel -q 2>&1 || true; jetson_clocks --show 2>&1 || true; date -u; }} > device.txt
told=$(sed -n '/NV Power Mode:/{{s/.*NV Power Mode: *//;s/^MODE_//;s/[[:space:]]*$//;p;q;}}' device.txt)
[ "$told" = "$mode" ] || echo "expected power mode $mode; got ${{told:-none}}; set it with nvpmodel -m ID" >&2
"""
    for _, plan, _ in plans:
        log = f"{Path(plan).stem}.bench.log"
        text += f'\necho "timing {plan}"\n'
        text += _command(trtexec_bench(plan, version), log)
        text += f"grep -E 'GPU Compute Time|unstable' {log} || true\n"
    text += '\necho "timing the layers of model.plan"\n' + _command(trtexec_profile("model.plan"), "model.profile.log")
    for index, entry in enumerate(listed):
        feeds = ",".join(f"{i['name']}:{i['file']}" for i in entry["inputs"])
        arguments = [
            "--loadEngine=model.plan",
            f"--loadInputs={feeds}",
            f"--exportOutput=output_{index}.json",
            "--warmUp=0",
            "--duration=0",
            "--iterations=1",
        ]
        text += "\n" + _command(arguments, f"output_{index}.log")
    return text + (f"\npython3 check.py {tolerance:g}\n" if listed else "")


_CHECK = '''#!/usr/bin/env python3
"""Compare what trtexec wrote (output_N.json) with the references. Needs only Python."""

import json
import math
import struct
import sys
from pathlib import Path

CODES = {"float16": "e", "float32": "f", "float64": "d", "int32": "i", "int64": "q", "int8": "b", "uint8": "B"}
CODES["bool"] = "B"
here = Path(__file__).resolve().parent
limit = float(sys.argv[1]) if len(sys.argv) > 1 else None
worst = 0.0
for index, entry in enumerate(json.loads((here / "references.json").read_text())):
    path = here / f"output_{index}.json"
    if not path.exists():
        sys.exit(f"expected {path.name}; got none; run bench.sh first")
    found = {item["name"]: item["values"] for item in json.loads(path.read_text())}
    for output in entry["outputs"]:
        code = CODES[output["type"]]
        raw = (here / output["file"]).read_bytes()
        want = struct.unpack(f"<{len(raw) // struct.calcsize(code)}{code}", raw)
        got = found.get(output["name"], [])
        if len(got) != len(want):
            sys.exit(f"expected {len(want)} values of {output['name']}; got {len(got)} in {path.name}")
        scale = max((abs(v) for v in want), default=0.0) or 1.0
        far = max((abs(a - b) for a, b in zip(want, got)), default=0.0)
        far = math.inf if any(math.isnan(float(v)) for v in got) else far / scale
        worst = max(worst, far)
        print(f"reference {index} {output['name']}: largest difference {far:.3g} of its scale {scale:.4g}")
if limit is not None and worst > limit:
    sys.exit(f"expected at most {limit:g}; got {worst:.3g}")
'''


def _readme(
    profile: Profile,
    version: str,
    mode: str,
    precision: str,
    plans: Sequence[tuple[str, str, bool]],
    notes: Sequence[str],
    tolerance: float,
) -> str:
    made = "\n".join(f"- `{plan}` from `{onnx}`{', sparse kernels allowed' if s else ''}" for onnx, plan, s in plans)
    said = "\n".join(f"- {note}" for note in notes)
    return f"""# Build kit for {profile.name}

{profile.description}. TensorRT {version}, power mode {mode}, model in {precision}.

{said}

Engines belong to one GPU, one TensorRT version and one power mode, so they are built where they run. On the device:

    sha256sum model.onnx       # compare with {MANIFEST}
    ./build.sh                 # trtexec; makes:
    ./bench.sh                 # timings in *.times.json, the device's state in device.txt, then check.py

{made}

`bench.sh` also times the layers. `fusepress explain RUN --layers model.layers.json --profile model.profile.json` says
from these two files where the time goes, and what mending it would win.

`check.py {tolerance:g}` fails where an output is further from the references (ONNX Runtime, CPU) than that part of its
scale. The references are in `references/` as raw little-endian arrays; `references.json` names them with shape and
type. `{MANIFEST}` lists every file with its sha256.
"""
