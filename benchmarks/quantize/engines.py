"""Engines for Ampere, Ada and Blackwell built ahead of time by TensorRT-RTX: what its own list says runs in INT8.

    python -m benchmarks.quantize.engines --data PATH/TO/KITTI/DRIVE [--networks street]

Two files of each network, those of benchmarks.quantize.methods: INT8 where the ladder ends, with an FP16 remainder, and
FP16 throughout. For every layer that the file has Q/DQ for, the builder's verbose list of layers is asked in which
precision the layer with that node computes. Nothing is run. Writes benchmarks/results/quantize/engines.json and .md.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.quantize.files import Bench, Json, benches, markdown, parser, write_result

if TYPE_CHECKING:
    from fusepress.export.inspector import EngineLayer

GPUS = {"8.6": "SM86", "8.9": "SM89", "12.0": "SM120"}
UNLISTED = "not listed"


def counted(wanted: Mapping[str, str], layers: Sequence[EngineLayer]) -> dict[str, int]:
    """In which precision the engine computes the layers of a file.

    Args:
        wanted: node -> its operator.
        layers: of the engine.

    Returns:
        "operator precision" -> count; `not listed` where no layer of the engine names the node.
    """
    ran = {node: layer.precision for layer in layers if layer.computes for node in layer.nodes}
    return dict(sorted(Counter(f"{op} {ran.get(node, UNLISTED)}" for node, op in wanted.items()).items()))


def layers_of(path: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Layers with weights of a file: those with Q/DQ in front and the others, node -> operator."""
    from fusepress.export.onnx import load_onnx
    from fusepress.export.precision import precision_map

    precisions, proto = precision_map(path), load_onnx(path)
    weights = {tensor.name for tensor in proto.graph.initializer}
    low: dict[str, str] = {}
    other: dict[str, str] = {}
    for node in proto.graph.node:
        if node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            continue
        if precisions[node.name] == "int8":
            low[node.name] = node.op_type
        elif weights.intersection(node.input):
            other[node.name] = node.op_type
    return low, other


def built(path: Path, gpu: str, folder: Path) -> Json:
    """One engine."""
    from fusepress.export.engine import build_rtx_engine

    info = build_rtx_engine(path, folder / "model.engine", compute_capabilities=[gpu])
    low, other = layers_of(path)
    return {
        "sha256": info.sha256,
        "size": info.size,
        "seconds": round(info.seconds, 1),
        "runtime_version": info.runtime_version,
        "engine_layers": len(info.layers),
        "reformats": sum(layer.reformats for layer in info.layers),
        "layers_with_qdq": counted(low, info.layers),
        "other_layers_with_weights": counted(other, info.layers),
        "warnings": list(info.warnings),
    }


def run(bench: Bench) -> Json:
    """All engines of a network."""
    found: Json = {}
    with tempfile.TemporaryDirectory(prefix="fusepress-") as folder:
        for precision, path in (("int8+fp16", bench.released("fp16")), ("fp16", bench.half())):
            for gpu in GPUS:
                found[f"{GPUS[gpu]} {precision}"] = built(path, gpu, Path(folder))
    return found


def table(networks: dict[str, Json]) -> list[str]:
    """As Markdown."""
    rows = []
    for name, engines in networks.items():
        for engine, row in engines.items():
            counts = row["layers_with_qdq"]
            cells = [name, engine]
            for kinds in (("Conv", "ConvTranspose"), ("MatMul", "Gemm")):
                own = {key: count for key, count in counts.items() if key.split()[0] in kinds}
                in_int8 = sum(count for key, count in own.items() if key.endswith(" int8"))
                cells += [str(sum(own.values())), str(in_int8)]
            other = ", ".join(f"{count} {key}" for key, count in row["other_layers_with_weights"].items()) or "none"
            rows.append([*cells, other, str(row["reformats"]), f"{row['size'] / 2**20:.2f}"])
    convolutions = ("Convolutions with Q/DQ ", "in INT8 ")
    products = ("Matrix products with Q/DQ ", "in INT8 ")
    header = ("Network", "Engine", *convolutions, *products, "Other layers with weights", "Reformats ", "MiB ")
    return markdown(header, rows)


def main() -> int:
    arguments = parser(__doc__).parse_args()
    from fusepress.pipeline.stages.base import tool_versions

    networks: dict[str, Any] = {
        bench.network.name: bench.cell("engines", partial(run, bench)) for bench in benches(arguments)
    }
    result: Json = {
        "command": "python -m benchmarks.quantize.engines --data DRIVE",
        "tools": tool_versions("tensorrt_rtx", "nvidia-modelopt", "onnx"),
        "kind": "built ahead of time without a GPU; nothing was run",
        "networks": networks,
    }
    version = result["tools"]["tensorrt_rtx"]
    write_result(
        "engines", result, [f"`{result['command']}`; TensorRT-RTX {version}; nothing was run", "", *table(networks)]
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
