"""What the network has to beat: `python examples/kitti_depth/baselines.py DATA [--checkpoint FILE]`.

Prints RMSE, MAE and delta<1.25 over the held-out points of the evaluation split, with the task's own metric code, of

* the nearest known point (in pixels) copied to every pixel,
* one constant depth: the mean of the training labels (the best constant for RMSE),
* and, given a checkpoint, the network with the image and with a black image.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from fusepress import FusepressError
from fusepress.pipeline.corrupt import corrupt
from fusepress.pipeline.evaluate import Predict, evaluate, torch_predict
from fusepress.pipeline.task import LoadedTask, load_task

Floats = NDArray[np.floating[Any]]


def nearest_neighbour(sparse: Floats) -> Floats:
    """Fill a depth map (height, width; 0 unknown) with the value of the nearest known pixel; all 0 if none is known."""
    if not np.any(sparse > 0):
        return np.zeros_like(sparse)
    row, column = distance_transform_edt(sparse <= 0, return_distances=False, return_indices=True)
    filled: Floats = sparse[row, column]
    return filled


def predict_nearest(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Nearest known point for every sample of a batch."""
    maps = [nearest_neighbour(sample[0].numpy()) for sample in inputs["sparse_depth"]]
    return {"depth": torch.from_numpy(np.stack(maps))[:, None]}


def predict_constant(task: LoadedTask) -> Predict:
    """The mean depth of the training frames' held-out points everywhere."""
    labels = [task.user.sample(frame)[2] for frame, _ in task.user.frames("train")]
    mean = float(np.concatenate([label[label > 0] for label in labels]).mean())
    return lambda inputs: {"depth": torch.full_like(inputs["sparse_depth"], mean)}


def predict_network(task: LoadedTask, checkpoint: Path) -> Predict:
    """The trained network."""
    model = task.build_model()
    model.load_state_dict(load_file(checkpoint))
    return torch_predict(task, model)


def table(task: LoadedTask, checkpoint: Path | None = None) -> dict[str, dict[str, float]]:
    """The task's metrics of every predictor on the evaluation split."""
    rows = {
        "constant": evaluate(task, predict_constant(task)).metrics,
        "nearest neighbour": evaluate(task, predict_nearest).metrics,
    }
    if checkpoint is not None:
        network = predict_network(task, checkpoint)
        rows["network"] = evaluate(task, network).metrics
        for failure, name in (("camera_blank", "network, black image"), ("lidar_blank", "network, no LiDAR")):
            rows[name] = evaluate(task, network, corrupt=lambda batch, f=failure: corrupt(task, batch, f)).metrics  # type: ignore[misc]
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a KITTI drive, or a folder of drives")
    parser.add_argument("--checkpoint", type=Path, help="safetensors written by train.py or by `fusepress compress`")
    arguments = parser.parse_args()
    try:
        task = load_task("task.py:KittiDepthTask", base=Path(__file__).parent, data=arguments.data)
        rows = table(task, arguments.checkpoint)
    except (FusepressError, OSError, RuntimeError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    print(f"{len(task.user.frames('eval'))} evaluation frames, {len(task.user.frames('train'))} training frames")  # noqa: T201
    print(f"{'':22}{'RMSE m':>8}{'MAE m':>8}{'<1.25':>8}")  # noqa: T201
    for name, metrics in rows.items():
        print(f"{name:22}{metrics['rmse']:8.3f}{metrics['mae']:8.3f}{metrics['delta1']:8.3f}")  # noqa: T201


if __name__ == "__main__":
    main()
