"""How long the prediction of a network of 1,000 layers takes after loading: as arrays, and layer by layer.

    OMP_NUM_THREADS=1 python -m benchmarks.latency.speed [--out FILE]

A chain of 1,000 convolutions, each with its ReLU, of widths drawn from 16 to 256, on jetson-agx-orin-64gb in FP16. The
plain way asks the same functions for one layer, or for one setting of the widths, at a time; both give the same
milliseconds, which is checked. Whole is `predict_network`, with interval, reasons and layers. Seconds are those of the
process on one thread, the best of five: other work on the machine disturbs them less than the clock on the wall. What a
search over the widths of a real network costs, and surgery and export beside it, is in
benchmarks/results/pruning/latency_cost.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from fusepress.pipeline.store import atomic_write_text
from fusepress.targets.kernels import kernel_times
from fusepress.targets.network import Network, read_network
from fusepress.targets.predict import predict_network
from fusepress.targets.profile import Precision, load_profile
from fusepress.targets.roofline import constants_of
from fusepress.targets.work import Array, Work, describe_work, join_works

RESULTS = Path(__file__).resolve().parents[1] / "results" / "latency" / "speed.json"
COMMAND = "OMP_NUM_THREADS=1 python -m benchmarks.latency.speed"
TARGET = "jetson-agx-orin-64gb"
PRECISION: Precision = "fp16"
LAYERS, SIZE, SEED, SETTINGS, REPEATS = 1000, 20, 0, 16, 5
CHANNELS = (16, 257)
ASKED_MS = 50.0
PROFILE = load_profile(TARGET)
CONSTANTS = constants_of(PROFILE).constants


def chain(channels: Sequence[int]) -> bytes:
    """Convolutions of 3 x 3, each with a ReLU; weights have a shape and no data."""
    nodes, weights = [], []
    for index, (before, after) in enumerate(itertools.pairwise(channels)):
        nodes.append(
            helper.make_node(
                "Conv",
                [f"x{index}", f"w{index}"],
                [f"y{index}"],
                name=f"conv{index}",
                pads=[1] * 4,
                kernel_shape=[3, 3],
            )
        )
        nodes.append(helper.make_node("Relu", [f"y{index}"], [f"x{index + 1}"], name=f"relu{index}"))
        weights.append(onnx.TensorProto(name=f"w{index}", data_type=TensorProto.FLOAT, dims=[after, before, 3, 3]))
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, width, SIZE, SIZE])
        for name, width in (("x0", channels[0]), (f"x{len(channels) - 1}", channels[-1]))
    ]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], weights)
    return bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]).SerializeToString())


def best_ms(work: Callable[[], object]) -> float:
    """Processor milliseconds."""
    taken = []
    for _ in range(REPEATS):
        started = time.process_time()
        work()
        taken.append(time.process_time() - started)
    return 1e3 * min(taken)


def one_by_one(work: Work) -> Array:
    """Milliseconds of each layer, asked for by itself."""
    return np.asarray(
        [
            kernel_times(_layer(work, index), PROFILE, PROFILE.mode(), CONSTANTS).total[0]
            for index in range(len(work.names))
        ]
    )


def at_once(work: Work) -> Array:
    """The same in one call."""
    return kernel_times(work, PROFILE, PROFILE.mode(), CONSTANTS).total


def _layer(work: Work, index: int) -> Work:
    """One entry, with the touches of it."""
    mine = work.tensor_kernel == index
    cut: dict[str, Any] = {
        name: getattr(work, name)[index : index + 1]
        for name in (
            "names", "ops", "precisions", "macs", "rows", "columns", "depth", "groups", "matrix", "smooth", "launches",
            "weight_bytes", "weight_reuse_bytes",
        )
    }  # fmt: skip
    return Work(
        **cut,
        tensor_bytes=work.tensor_bytes[mine],
        tensor_reuse_bytes=work.tensor_reuse_bytes[mine],
        tensor_kernel=np.zeros(int(mine.sum()), dtype=np.intp),
    )


def measure() -> dict[str, Any]:
    """All times, and how far the two ways are apart."""
    draw = np.random.default_rng(SEED)
    networks: list[Network] = [
        read_network(chain(draw.integers(*CHANNELS, size=LAYERS + 1).tolist())) for _ in range(SETTINGS)
    ]
    works = [describe_work(network, PRECISION) for network in networks]
    joined = join_works(works)
    apart = np.concatenate([at_once(work) for work in works])
    layers = one_by_one(works[0])
    return {
        "layers": len(works[0].names),
        "whole_ms": best_ms(lambda: predict_network(networks[0], PROFILE, PRECISION)),
        "asked_ms": ASKED_MS,
        "describe_ms": best_ms(lambda: describe_work(networks[0], PRECISION)),
        "price_ms": best_ms(lambda: at_once(works[0])),
        "price_layer_by_layer_ms": best_ms(lambda: one_by_one(works[0])),
        "settings": SETTINGS,
        "price_settings_ms": best_ms(lambda: at_once(joined)),
        "price_settings_one_by_one_ms": best_ms(lambda: [at_once(work) for work in works]),
        "worst_relative_difference": float(
            max(np.abs(layers / at_once(works[0]) - 1).max(), np.abs(at_once(joined) / apart - 1).max())
        ),
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    found = measure()
    for name, value in found.items():
        print(f"{name:<32}{value:.4g}")
    result = {
        "command": COMMAND,
        "target": TARGET,
        "precision": PRECISION,
        "seed": SEED,
        "versions": {"python": platform.python_version(), "numpy": np.__version__, "onnx": onnx.__version__},
        **found,
    }
    atomic_write_text(options.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
