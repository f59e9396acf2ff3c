"""Short training under the INT8 of a file, from its ranges by the largest magnitude, as the qat stage does it.

Where the file has Q/DQ the model is quantised while it is trained, with its own float network as teacher; the trained
weights are exported as ever, and the trained scales written into the Q/DQ of that file. A training that was stopped
goes on from its last checkpoint in the store.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.quantize.files import SEED

if TYPE_CHECKING:
    from benchmarks.quantize.files import Bench

STEPS = 24
LR = 1e-4
PLACED_BY = 2  # samples that the file's tensors are found again by
CHECKPOINT_EVERY = 4


def train_quantised(bench: Bench, path: Path) -> None:
    """Train the network of a bench and write its INT8 file, float32 remainder."""
    import torch

    from fusepress.calib.qat import TrainedScales, placement_of, with_trained_scales
    from fusepress.calib.quantize import draft_int8
    from fusepress.pipeline.graph.fakequant import fake_quantised
    from fusepress.pipeline.recipe import FinetuneConfig
    from fusepress.pipeline.recovery.finetune import clear_checkpoints, finetune

    model = bench.network.model()
    samples = [
        {name: torch.from_numpy(np.array(array[s : s + 1])) for name, array in bench.arrays.items()}
        for s in range(PLACED_BY)
    ]
    config = FinetuneConfig(steps=STEPS, lr=LR, freeze_batchnorm=True, distill=True, checkpoint_every=CHECKPOINT_EVERY)
    work = bench.folder / "qat"
    work.mkdir(exist_ok=True)
    with fake_quantised(model, placement_of(bench.draft, PLACED_BY), samples, learn=True) as quantised:
        finetune(model, bench.network.model(), bench.network.task, config, seed=SEED, workdir=work, progress=_tell)
        scales = quantised.steps()
    trained = bench.network.export(path.with_suffix(".float.onnx"), model)
    draft = draft_int8(trained, bench.arrays, sample_ids=bench.card.sample_ids)
    learned = TrainedScales(precision="int8", method="max, then learned in training", scales=scales)
    with_trained_scales(draft, learned)[0].write(path)
    trained.unlink()
    clear_checkpoints(work)


def _tell(progress: Any) -> None:
    print(f"step {progress.step} of {progress.steps}: {sum(progress.losses.values()):.4f}", flush=True)
