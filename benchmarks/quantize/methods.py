"""Street in INT8, all layers, against FP32 in ONNX Runtime: accuracy by the method that chooses the ranges.

    python -m benchmarks.quantize.methods [--samples 64] [--threads 1] [--methods max percentile mse entropy]

The dense network of examples/street with its committed weights is exported, calibrated on `samples` of the calib split
and judged on the whole eval split, with a float32 remainder and Q/DQ computed as written. `entropy` is what modelopt
does unless told otherwise. Differences are paired, with the 95 % interval of the bootstrap over streets. Writes
benchmarks/results/quantize/methods.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "quantize" / "methods.json"
REPLICATES = 1000


def exported(task: Any, path: Path) -> Path:
    """The dense network as a target gets it."""
    from fusepress.export.onnx import export_onnx
    from fusepress.pipeline.graph.apply import load
    from fusepress.pipeline.task import first_batch

    model = load(task.build_model(), None, ROOT / "examples/street/street.safetensors").eval()
    export_onnx(model, first_batch(task, "calib", size=1).inputs, ["output"], path)
    return path


def against_float(task: Any, floating: Any, found: Any) -> dict[str, Any]:
    """Accuracy, and its drop with the interval."""
    from fusepress.pipeline.gates import Replicates, compare, drop_interval

    condition = compare(floating.stats, found.stats, task.score, found.groups, replicates=REPLICATES, seed=0)
    replicates = Replicates(clean=condition, samples=found.n, clusters=len(set(found.groups)))
    drop, interval = drop_interval(replicates, task.primary, task.metrics[task.primary])
    assert interval is not None
    value = floating.metrics[task.primary]
    return {
        task.primary: found.metrics[task.primary],
        "drop": drop,
        "drop_low": interval.low,
        "drop_high": interval.high,
        "relative_drop": drop / value,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--methods", nargs="+", default=["max", "percentile", "mse", "entropy"])
    arguments = parser.parse_args()
    from fusepress.calib.dataset import calibration_arrays, choose_calibration
    from fusepress.calib.quantize import draft_int8, macs_share
    from fusepress.calib.sensitivity import Tries
    from fusepress.export.runtime import OnnxSession
    from fusepress.pipeline.evaluate import evaluate
    from fusepress.pipeline.stages.base import tool_versions
    from fusepress.pipeline.task import load_task

    task = load_task("examples/street/task.py:StreetTask", base=ROOT)
    card = choose_calibration(task, arguments.samples, 0)
    arrays = calibration_arrays(task, card)
    batches = list(task.batches("eval", 0))

    def session(path: Path) -> OnnxSession:
        return OnnxSession(path, arguments.threads)

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="fusepress-") as folder:
        source = exported(task, Path(folder) / "street.onnx")
        floating = evaluate(task, session(source), "eval", batches=batches)
        print(f"fp32: {floating.metrics[task.primary]:.4f}", flush=True)
        for method in arguments.methods:
            begin = time.monotonic()
            draft = draft_int8(source, arrays, method=method, sample_ids=card.sample_ids)
            seconds = time.monotonic() - begin
            found = evaluate(task, session(draft.write(Path(folder) / "int8.onnx")), "eval", batches=batches)
            row = {
                "method": method,
                "macs_share_int8": macs_share(draft.float_proto, draft.units()),
                "output_error": Tries(draft, arrays, 8, session).error(()),
                **against_float(task, floating, found),
                "seconds_to_calibrate": round(seconds, 1),
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
    result = {
        "command": " ".join(["python -m benchmarks.quantize.methods", *sys.argv[1:]]),
        "tools": tool_versions("nvidia-modelopt", "onnx", "onnxruntime-gpu", "torch", "numpy"),
        "threads": arguments.threads,
        "kind": "simulated: INT8 Q/DQ with a float32 remainder on ONNX Runtime CPU, 256 evaluation samples",
        "calibration_samples": len(card.sample_ids),
        "calibration_card_sha256": card.sha256,
        "replicates": REPLICATES,
        "fp32": floating.metrics[task.primary],
        "metric": task.primary,
        "output_error_is": "relative squared error of the logits on 8 calibration samples",
        "rows": rows,
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
