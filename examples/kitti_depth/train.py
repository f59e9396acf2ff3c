"""Train the dense network: `python examples/kitti_depth/train.py DATA FILE.safetensors [--steps N] [--threads N]`.

`fusepress compress` does the same by itself when the recipe's checkpoint is absent. Weights trained on KITTI carry
its licence (CC BY-NC-SA 3.0): non-commercial.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from fusepress import FusepressError
from fusepress.pipeline.task import load_task


def main() -> None:
    """Train, report once a few seconds, write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a KITTI drive, or a folder of drives")
    parser.add_argument("checkpoint", type=Path, help="safetensors file to write")
    parser.add_argument("--steps", type=int, help="optimiser steps (default: the task's)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    began = reported = time.monotonic()

    def progress(fraction: float, text: str) -> None:
        nonlocal reported
        now = time.monotonic()
        if now - reported > 5 or fraction == 1:
            reported = now
            print(f"{now - began:5.0f} s  {text}", file=sys.stderr)  # noqa: T201

    try:
        task = load_task("task.py:KittiDepthTask", base=Path(__file__).parent, data=arguments.data).user
        task.dense_steps = arguments.steps or task.dense_steps
        task.train_dense(arguments.checkpoint, progress)
    except (FusepressError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
