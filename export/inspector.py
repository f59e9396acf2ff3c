"""What a builder says about the layers of an engine, in the three dialects that there are.

* TensorRT-RTX: one verbose log message, `Layers:` and a line a layer (the only list to be had without a GPU).
* TensorRT 10: the inspector's JSON (also `trtexec --exportLayerInfo`), with `Bindings` and a joint `Format/Datatype`.
* TensorRT 11: the same with `I/O Tensors` and with `Format` and `Datatype` apart.

`trtexec --exportProfile` adds the time of each layer. Sources: logs of TensorRT-RTX 1.7 as run for this project; the
JSON of TensorRT from samples/common/sampleReporting.cpp, samples/trtexec and the migration guide to TensorRT 11, not
from an engine of ours.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fusepress.pipeline.errors import BuildError

Layout = Literal["10", "11", "names"]
UNKNOWN = "unknown"
_DATATYPES = {
    "float": "fp32",
    "fp32": "fp32",
    "half": "fp16",
    "fp16": "fp16",
    "bfloat16": "bf16",
    "bf16": "bf16",
    "int8": "int8",
    "fp8": "fp8",
    "int32": "int32",
    "int64": "int64",
    "bool": "bool",
}
_TYPE_IN_TEXT = re.compile(r"\b(fp32|fp16|bf16|int8|fp8|int32|int64|bool|float|half)\b", re.IGNORECASE)
_LOG_LAYER = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<type>\w+), Inputs: \[(?P<inputs>.*?)\], Constants: \[.*\], "
    r"Outputs: \[(?P<outputs>.*?)\], TacticName: (?P<tactic>[^,]*)"
)
_ONNX_LAYER = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
_COMPUTE = re.compile(r"correlation|gemm|deconv|conv|matrixmultiply|runtime_fusion", re.IGNORECASE)
_REFORMAT = re.compile(r"reformat", re.IGNORECASE)
_PROFILE_ENTRY = re.compile(
    r'"name"\s*:\s*"(?P<name>.*)"\s*,\s*"timeMs"\s*:.*?"averageMs"\s*:\s*(?P<ms>\d+(?:\.\d*)?(?:[eE][-+]?\d+)?)'
)
LONGEST_MS = 1e9  # what is longer is no time of a layer


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLayer:
    """One layer of an engine.

    Attributes:
        name: in the engine; fused names are joined with " + ".
        type: the builder's word for it ("unknown" where only names are to be had).
        precision: what it computes in.
        nodes: the ONNX nodes that went into it.
        inputs, outputs: precisions of its tensors, without constants.
        tactic: name of the kernel.
        has_sparse_weights: the builder found its weights 2:4; None where it does not say.
    """

    name: str
    type: str
    precision: str
    nodes: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    tactic: str = ""
    has_sparse_weights: bool | None = None

    @property
    def computes(self) -> bool:
        """Whether it is a convolution or a matrix product."""
        return _COMPUTE.search(self.type) is not None and not self.reformats

    @property
    def reformats(self) -> bool:
        """Whether it only moves a tensor to another format or precision."""
        return _REFORMAT.search(self.type) is not None or self.name.startswith("Reformatting CopyNode")


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """An inspector's JSON: its layers in running order, the names of inputs and outputs, and which layout it had."""

    layers: tuple[EngineLayer, ...]
    tensors: tuple[str, ...]
    layout: Layout


def parse_layers(log: str) -> tuple[EngineLayer, ...]:
    """Layers from the verbose log of TensorRT-RTX.

    The precision of a layer with weights is that of its first input; of any other, of its first output.
    """
    layers = []
    for line in log.splitlines():
        match = _LOG_LAYER.search(line)
        if match is None:
            continue
        inputs, outputs = _log_types(match["inputs"]), _log_types(match["outputs"])
        layers.append(
            EngineLayer(
                name=match["name"],
                type=match["type"],
                precision=_precision(match["type"], inputs, outputs),
                nodes=tuple(_ONNX_LAYER.findall(line)),
                inputs=inputs,
                outputs=outputs,
                tactic=match["tactic"],
            )
        )
    return tuple(layers)


def _log_types(section: str) -> tuple[str, ...]:
    return tuple(_DATATYPES.get(found.lower(), found) for found in re.findall(r"Datatype: (\w+)", section))


def _precision(kind: str, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> str:
    order = (inputs, outputs) if _COMPUTE.search(kind) else (outputs, inputs)
    return next((types[0] for types in order if types), UNKNOWN)


def parse_inspection(text: str, *, where: str = "the inspector's answer") -> Inspection:
    """Layers from an inspector's JSON, of TensorRT 10 or 11.

    Raises:
        BuildError: it is not JSON, or holds no list of layers.
    """
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BuildError(
            f"expected the JSON of an engine inspector; got something else at {where} ({error}); write it with "
            "trtexec --exportLayerInfo=layers.json --profilingVerbosity=detailed"
        ) from error
    if not isinstance(raw, Mapping) or not isinstance(raw.get("Layers"), list):
        found = ", ".join(map(str, raw)) if isinstance(raw, Mapping) else type(raw).__name__
        raise BuildError(
            f"expected a list `Layers`; got {found or 'nothing'} at {where}; write it with trtexec "
            "--exportLayerInfo=layers.json"
        )
    entries, new = raw["Layers"], "I/O Tensors" in raw
    tensors = raw.get("I/O Tensors" if new else "Bindings", [])
    if not isinstance(tensors, list) or not all(isinstance(entry, str | Mapping) for entry in entries):
        raise BuildError(
            f"expected layers and tensors by name or with properties; got something else at {where}; write it with "
            "trtexec --exportLayerInfo=layers.json"
        )
    only_names = bool(entries) and all(isinstance(entry, str) for entry in entries)
    return Inspection(
        layers=tuple(_named_layer(e) if isinstance(e, str) else _json_layer(e) for e in entries),
        tensors=tuple(str(t.get("Name", "")) if isinstance(t, Mapping) else str(t) for t in tensors),
        layout="names" if only_names else "11" if new else "10",
    )


def _named_layer(name: str) -> EngineLayer:
    """Without --profilingVerbosity=detailed there is nothing but the name."""
    return EngineLayer(name=name, type=UNKNOWN, precision=UNKNOWN, nodes=_nodes_of_name(name))


def _json_layer(entry: Mapping[str, Any]) -> EngineLayer:
    name, kind = str(entry.get("Name", "")), str(entry.get("LayerType", UNKNOWN))
    inputs, outputs = (_json_types(entry.get(side, [])) for side in ("Inputs", "Outputs"))
    sparse = entry.get("HasSparseWeights")
    return EngineLayer(
        name=name,
        type=kind,
        precision=_precision(kind, inputs, outputs),
        nodes=tuple(_ONNX_LAYER.findall(str(entry.get("Metadata", "")))) or _nodes_of_name(name),
        inputs=inputs,
        outputs=outputs,
        tactic=str(entry.get("TacticName", "")),
        has_sparse_weights=None if sparse is None else bool(sparse),
    )


def _json_types(tensors: Any) -> tuple[str, ...]:
    """Precision of each tensor: `Datatype` of TensorRT 11, or the word in `Format/Datatype` of 10."""
    found = []
    for tensor in tensors if isinstance(tensors, list) else []:
        text = str(tensor.get("Datatype") or tensor.get("Format/Datatype") or "") if isinstance(tensor, Mapping) else ""
        match = _TYPE_IN_TEXT.search(text)
        found.append(_DATATYPES[match.group(1).lower()] if match else UNKNOWN)
    return tuple(found)


def _nodes_of_name(name: str) -> tuple[str, ...]:
    if name.startswith("Reformatting CopyNode") or "ForeignNode" in name:
        return ()
    return tuple(part.strip() for part in name.split(" + "))


def parse_profile(text: str, *, where: str = "the profile") -> dict[str, float]:
    """Mean milliseconds of each layer, from `trtexec --exportProfile`.

    Names are not escaped there, so that the file may not be JSON; what two entries share is added up.

    Raises:
        BuildError: there is no entry with a name and a time.
    """
    found: dict[str, float] = {}
    for name, ms in _profile_entries(text):
        found[name] = found.get(name, 0.0) + ms
    if not found:
        raise BuildError(
            f"expected layers with averageMs; got none at {where}; write it with trtexec --dumpProfile "
            "--separateProfileRun --exportProfile=profile.json"
        )
    return found


def _profile_entries(text: str) -> list[tuple[str, float]]:
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError):
        return [(m["name"], float(m["ms"])) for m in map(_PROFILE_ENTRY.search, text.splitlines()) if m]
    rows = [row for row in raw if isinstance(row, Mapping)] if isinstance(raw, list) else []
    timed = [row for row in rows if "name" in row and _is_time(row.get("averageMs"))]
    return [(str(row["name"]), float(row["averageMs"])) for row in timed]


def _is_time(value: Any) -> bool:
    return isinstance(value, int | float) and 0 <= value < LONGEST_MS


def read_layers(path: Path) -> tuple[EngineLayer, ...]:
    """Layers of a file: an inspector's JSON, or a log of TensorRT-RTX.

    Raises:
        BuildError: the file is missing, or is neither.
    """
    if not path.is_file():
        raise BuildError(f"expected a list of layers; got no file at {path}; build again, or correct the path")
    text = path.read_text(errors="replace")
    if text.lstrip().startswith("{"):
        return parse_inspection(text, where=str(path)).layers
    layers = parse_layers(text)
    if not layers:
        raise BuildError(
            f"expected the layers of an engine; got none at {path}; give the JSON of trtexec --exportLayerInfo, or the "
            "verbose log of TensorRT-RTX"
        )
    return layers
