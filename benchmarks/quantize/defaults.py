"""INT8 by modelopt with nothing chosen but the CPU to calibrate on, in a process of its own.

python -m benchmarks.quantize.defaults IN.onnx ARRAYS.npz OUT.onnx
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fusepress.export.onnx import load_onnx
from fusepress.export.precision import save_arrays
from fusepress.pipeline.errors import QuantizeError

ROOT = Path(__file__).resolve().parents[2]


def quantize_by_defaults(onnx_in: Path, arrays: Mapping[str, Any], onnx_out: Path) -> Path:
    """Write what modelopt makes of a float32 model: its method, its exclusions, its FP16 remainder.

    Raises:
        QuantizeError: modelopt fails.
    """
    data = onnx_out.with_suffix(".npz")
    save_arrays(data, load_onnx(onnx_in), arrays)
    command = [sys.executable, "-m", "benchmarks.quantize.defaults", str(onnx_in), str(data), str(onnx_out)]
    environment = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    data.unlink()
    if done.returncode != 0 or not onnx_out.is_file():
        raise QuantizeError(
            f"expected modelopt to quantise the model; got exit status {done.returncode} at {onnx_in}:\n"
            f"{done.stderr[-1000:]}\nrun the command by hand: {' '.join(command[1:])}"
        )
    return onnx_out


def main() -> int:
    source, arrays, out = sys.argv[1:]
    with np.load(arrays, allow_pickle=False) as stored:
        data = {name: stored[name] for name in stored.files}
    from modelopt.onnx.quantization import quantize

    quantize(source, calibration_data=data, calibration_eps=["cpu"], output_path=out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
