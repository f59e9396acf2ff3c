"""The street network at twice its width: 3x3 convolutions of 256 channels, where 2:4 kernels can pay.

    python benchmarks/sparsity/wide_task.py --steps 3000

trains it from scratch (hours on one core; killed, it goes on from its last checkpoint) into
runs/sparsity/wide.safetensors, where wide.yaml expects it.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
STREET = ROOT / "examples" / "street"
OUT = ROOT / "runs" / "sparsity"
sys.path.insert(0, str(STREET))

from street_model import StreetFusion  # noqa: E402 - found in the example's folder

from fusepress.pipeline.graph.apply import weights_bytes  # noqa: E402
from fusepress.pipeline.recipe import FinetuneConfig  # noqa: E402
from fusepress.pipeline.recovery.finetune import TrainProgress, finetune  # noqa: E402
from fusepress.pipeline.store import atomic_write_bytes  # noqa: E402
from fusepress.pipeline.task import load_task  # noqa: E402

WIDTH = 2.0
LOG = logging.getLogger("wide")
_Street: Any = type(load_task("task.py:StreetTask", base=STREET).user)


class WideStreet(_Street):  # type: ignore[misc]
    """The plain task with a wider network."""

    def build_model(self) -> torch.nn.Module:
        """Twice the channels."""
        return StreetFusion(width=WIDTH)


def main() -> None:
    """Train the dense network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    task = load_task(f"{Path(__file__).name}:WideStreet", base=Path(__file__).parent)
    model = task.build_model()
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
