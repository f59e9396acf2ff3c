"""The street network with 256 channels in both third stages, whose 3x3 convolutions are wide enough for 2:4 kernels.

    python benchmarks/sparsity/wide_task.py

trains it into runs/sparsity/wide.safetensors, where wide.yaml expects it (about 20 minutes on one core; killed, it goes
on from its last checkpoint). It starts from the weights of street.safetensors: they fill the first channels, and the
new ones start at random.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
STREET = ROOT / "examples" / "street"
OUT = ROOT / "runs" / "sparsity"
sys.path.insert(0, str(STREET))

from street_model import Residual, StreetFusion, conv_bn_relu  # noqa: E402 - found in the example's folder

from fusepress.pipeline.graph.apply import weights_bytes  # noqa: E402
from fusepress.pipeline.recipe import FinetuneConfig  # noqa: E402
from fusepress.pipeline.recovery.finetune import TrainProgress, finetune  # noqa: E402
from fusepress.pipeline.store import atomic_write_bytes  # noqa: E402
from fusepress.pipeline.task import load_task  # noqa: E402

INPUTS, WIDE, LATERAL = 96, 256, 48  # channels of the second stages, of the third ones, of the pyramids
LOG = logging.getLogger("wide")
_Street: Any = type(load_task("task.py:StreetTask", base=STREET).user)


class WideStreet(_Street):  # type: ignore[misc]
    """The plain task with wider third stages."""

    def build_model(self) -> torch.nn.Module:
        """Five 3x3 convolutions of 256 input or output channels in the camera's and the LiDAR's third stage."""
        model = StreetFusion()
        model.camera.stage3 = Residual(INPUTS, WIDE, stride=2)
        model.lidar.stage3 = torch.nn.Sequential(conv_bn_relu(INPUTS, WIDE, stride=2), Residual(WIDE, WIDE))
        model.camera.pyramid.laterals[-1] = conv_bn_relu(WIDE, LATERAL, kernel=1)
        model.lidar.pyramid.laterals[-1] = conv_bn_relu(WIDE, LATERAL, kernel=1)
        return model


def fill(model: torch.nn.Module, narrow: dict[str, torch.Tensor]) -> None:
    """Copy a narrower network's tensors into the first channels of the model's, in place.

    Args:
        model: every tensor is at least as large as its namesake, in every dimension.
        narrow: all its tensors by name.
    """
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor[tuple(slice(size) for size in narrow[name].shape)] = narrow[name]


def main() -> None:
    """Train the dense network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    task = load_task(f"{Path(__file__).name}:WideStreet", base=Path(__file__).parent)
    model = task.build_model()
    fill(model, load_file(STREET / "street.safetensors"))
    config = FinetuneConfig(
        steps=options.steps, lr=options.lr, weight_decay=1e-3, ema=0.997, distill=False, precision="bf16"
    )

    def tell(now: TrainProgress) -> None:
        if now.step % 50 == 0:
            LOG.info("step %d/%d loss %.3f, %.0f s left", now.step, now.steps, sum(now.losses.values()), now.eta_s)

    finetune(model, None, task, config, seed=options.seed, workdir=OUT / "wide", progress=tell)
    atomic_write_bytes(OUT / "wide.safetensors", weights_bytes(model))


if __name__ == "__main__":
    main()
