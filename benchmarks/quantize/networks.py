"""The networks that the benchmarks of quantisation are about, and a street whose channels have unlike ranges."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from fusepress.pipeline.task import LoadedTask

ROOT = Path(__file__).resolve().parents[2]
STREET = ROOT / "examples/street"
NAMES = ("street", "street_unlike", "multi", "kitti_depth")
# as in examples/kitti_depth/int8.yaml; six frames for calibration cannot prove half a per cent
EXCLUDED = {"kitti_depth": ("choice", "correction", "lidar/Add")}
MAX_DROP = {"kitti_depth": 0.1}
GAIN = 256.0  # a power of two: floats are multiplied by it without rounding


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """A trained network of a task.

    Attributes:
        name: for tables and file names.
        task: its task.
        weights: its checkpoint.
        change: what is done to the loaded network, which must not change what it computes.
        exclude: nodes and modules that the release leaves in floating point, as its recipe does.
        max_drop: what its recipe allows INT8 to lose; half a per cent when None.
    """

    name: str
    task: LoadedTask
    weights: Path
    change: Callable[[nn.Module], None] | None = None
    exclude: tuple[str, ...] = ()
    max_drop: float | None = None

    def model(self) -> nn.Module:
        """The trained network, in evaluation mode.

        Raises:
            PlanError: the checkpoint is of another architecture.
        """
        from fusepress.pipeline.graph.apply import load

        model = load(self.task.build_model(), None, self.weights).eval()
        if self.change is not None:
            self.change(model)
        return model

    def export(self, path: Path, model: nn.Module | None = None) -> Path:
        """Write it, or the same architecture with other weights, as ONNX, slimmed as the export stage does."""
        from fusepress.export.onnx import export_onnx
        from fusepress.export.passes import slim
        from fusepress.pipeline.evaluate import torch_predict
        from fusepress.pipeline.task import first_batch

        model, batch = model or self.model(), first_batch(self.task, "calib", size=1)
        raw = path.with_suffix(".raw.onnx")
        export_onnx(model, batch.inputs, list(torch_predict(self.task, model)(batch.inputs)), raw)
        slim(raw, path, [batch])
        raw.unlink()
        return path


def network(name: str, *, multi: Path, depth: Path, data: Path | None) -> Network:
    """A network by its name.

    Args:
        name: one of `NAMES`.
        multi: checkpoint of the multi-task transformer (examples/street/train_multi.py).
        depth: checkpoint of the depth network (examples/kitti_depth/train.py).
        data: folder of KITTI frames.
    """
    from fusepress.pipeline.task import load_task

    spec, weights = {
        "street": ("task.py:StreetTask", STREET / "street.safetensors"),
        "street_unlike": ("task.py:StreetTask", STREET / "street.safetensors"),
        "multi": ("multi_task.py:StreetMultiTask", multi),
        "kitti_depth": ("task.py:KittiDepthTask", depth),
    }[name]
    base = ROOT / "examples/kitti_depth" if name == "kitti_depth" else STREET
    task = load_task(spec, base=base, data=data if name == "kitti_depth" else None)
    change = make_unlike if name == "street_unlike" else None
    return Network(
        name=name,
        task=task,
        weights=weights,
        change=change,
        exclude=EXCLUDED.get(name, ()),
        max_drop=MAX_DROP.get(name),
    )


def make_unlike(model: Any) -> None:
    """Give the street network the two things that INT8 by one scale a tensor cannot bear, without changing a float.

    Channel 0 behind the camera's first convolution is `GAIN` times as large and read with weights that are as much
    smaller (an outlier channel, as batch norms leave them: Nagel et al. 2019, section 3.1); so are all LiDAR features
    where they meet the camera's in one tensor (a fused concatenation of unlike ranges).
    """
    import torch

    camera = model.camera.stage1[0]
    lidar, fuser = model.lidar.pyramid.smooth, model.fuser[0]
    with torch.no_grad():
        for parameter in (camera.first[1].weight, camera.first[1].bias):
            parameter[0] *= GAIN
        camera.second.weight[:, 0] /= GAIN
        for parameter in (lidar[1].weight, lidar[1].bias):
            parameter *= GAIN
        fuser.weight[:, -len(lidar[1].weight) :] /= GAIN
