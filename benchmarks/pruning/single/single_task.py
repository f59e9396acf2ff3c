"""The street world seen by one sensor alone: the camera-only and LiDAR-only networks of the comparison.

    python benchmarks/pruning/single/single_task.py

trains both (a few minutes on one core) into runs/single, where camera.yaml and lidar.yaml expect them. It is the
network and the training that the street example pre-trains each of its backbones with.
"""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[3]
STREET = ROOT / "examples" / "street"
sys.path.insert(0, str(STREET))

from street_model import SingleModality  # noqa: E402 - found in the example's folder

from fusepress.pipeline.task import load_task  # noqa: E402

STEPS = {"lidar": 500, "camera": 700}
_Street: Any = type(load_task("task.py:StreetTask", base=STREET).user)


class CameraStreet(_Street):  # type: ignore[misc]
    """Only the camera is looked at."""

    modality = "camera"
    branches = {"camera": ["backbone"]}

    def build_model(self) -> torch.nn.Module:
        """The backbone with a neck and head of its own."""
        return SingleModality(self.modality)


class LidarStreet(CameraStreet):
    """Only the LiDAR is looked at."""

    modality = "lidar"
    branches = {"lidar": ["backbone"]}


def main() -> None:
    """Train what is missing."""
    import train  # type: ignore[import-not-found]  # the example's own script

    torch.set_num_threads(1)
    folder = ROOT / "runs" / "single"
    for modality, steps in STEPS.items():
        torch.manual_seed(0)
        task = load_task("task.py:StreetTask", base=STREET).user
        model = train.pretrain(task, modality, steps, "bf16", folder)
        facts = {"steps": steps, "torch": torch.__version__, "python": platform.python_version()}
        facts |= {"metrics": train.judge(task, model)["all"]}
        print(modality, json.dumps(facts))


if __name__ == "__main__":
    main()
