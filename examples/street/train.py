"""Trains the street example: each backbone alone first, then both together. `python examples/street/train.py`.

Writes street.safetensors and metrics.json beside this file. About 20 minutes on one core with AMX (bf16).
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import math
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import street_world as world
import torch
from safetensors.torch import load_file, save_file
from street_model import SingleModality, StreetFusion
from torch import Tensor, nn

from fusepress.pipeline.task import Batch, load_task

HERE = Path(__file__).resolve().parent
LOG = logging.getLogger("street")
MODALITIES = ("camera", "lidar")
BATCH = 8
# Each phase draws its own stream of scenes.
SEEDS = {"camera": 101, "lidar": 102, "fusion": 103}


def batches(task: Any, seed: int, dead: float) -> Iterator[Batch]:
    """Endless training batches with a share of dead sensors."""
    for number in itertools.count():
        yield task.make("train", seed, list(range(number * BATCH, (number + 1) * BATCH)), dead=dead)


def fit(
    task: Any, model: nn.Module, stream: Iterator[Batch], steps: int, lr: float, precision: str, name: str
) -> nn.Module:
    """AdamW with warm-up and cosine to zero; the result is an exponential average of the weights."""
    model.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.997))
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, _warm_cosine(steps))
    began, recent = time.monotonic(), 0.0
    for step in range(1, steps + 1):
        batch = next(stream)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits = model(**batch.inputs)
        loss = torch.stack(list(task.losses(logits, batch).values())).sum()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimiser.step()
        schedule.step()
        average.update_parameters(model)
        recent = loss.item() if step == 1 else 0.98 * recent + 0.02 * loss.item()
        if step % 100 == 0 or step == steps:
            LOG.info("%s step %d/%d loss %.3f, %.0f s", name, step, steps, recent, time.monotonic() - began)
    trained: nn.Module = average.module
    _settle_batch_norm(trained, stream, 60)
    return trained.eval()


def _settle_batch_norm(model: nn.Module, stream: Iterator[Batch], count: int) -> None:
    """Averaged weights have statistics of their own: measure them afresh, all batches with equal weight."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    model.train()
    with torch.no_grad():
        for batch in itertools.islice(stream, count):
            model(**batch.inputs)
    for norm in norms:
        norm.momentum = 0.1


def _warm_cosine(steps: int) -> Callable[[int], float]:
    warm = max(1, min(100, steps // 10))

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1.0 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

    return factor


def judge(task: Any, model: nn.Module, blank: str | None = None) -> dict[str, dict[str, float]]:
    """The task's metrics over the whole eval split and over its first 64 samples (which a test can afford).

    In float32, with one sensor dead if named.
    """
    parts: list[dict[str, Tensor]] = []
    with torch.no_grad():
        for batch in task.batches("eval", 0):
            seen = task.corrupt(batch, f"{blank}_blank", 3) if blank else batch
            parts.append(task.sample_stats(model(**seen.inputs), batch))
    stats = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return {"all": task.score(stats), "first_64": task.score({name: value[:64] for name, value in stats.items()})}


def _save(model: nn.Module, path: Path) -> None:
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path)


def pretrain(task: Any, modality: str, steps: int, precision: str, keep: Path | None) -> nn.Module:
    """One backbone alone, with a head of its own; kept weights of an earlier run are used again."""
    model: nn.Module = SingleModality(modality)
    path = keep / f"{modality}.safetensors" if keep else None
    if path is not None and path.is_file():
        model.load_state_dict(load_file(path))
        return model.eval()
    model = fit(task, model, batches(task, SEEDS[modality], 0.0), steps, 1.5e-3, precision, modality)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _save(model, path)
    return model


def _command(options: argparse.Namespace) -> str:
    """What shapes the result, without where it is written."""
    steps = " ".join(str(count) for count in options.steps)
    return (
        f"python examples/street/train.py --steps {steps} --seed {options.seed} --threads {options.threads} "
        f"--precision {options.precision}"
    )


def main(arguments: list[str]) -> None:
    """Train, evaluate, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs=3, default=(900, 700, 2000), metavar=("CAMERA", "LIDAR", "FUSION"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="of the training arithmetic")
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--keep", type=Path, help="folder that keeps the pre-trained single-sensor networks")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    began, task = time.monotonic(), load_task("task.py:StreetTask", base=HERE).user
    found: dict[str, dict[str, dict[str, float]]] = {}
    fusion = StreetFusion()
    for modality, steps in zip(MODALITIES, options.steps[:2], strict=True):
        single = pretrain(task, modality, steps, options.precision, options.keep)
        found[f"{modality}_only"] = judge(task, single)
        LOG.info("%s only: %s", modality, found[f"{modality}_only"]["all"])
        fusion.get_submodule(modality).load_state_dict(single.get_submodule("backbone").state_dict())
    stream = batches(task, SEEDS["fusion"], task.dead_share)
    model = fit(task, fusion, stream, options.steps[2], 1.5e-3, options.precision, "fusion")
    found["fusion"] = judge(task, model)
    for modality in MODALITIES:
        found[f"fusion_without_{modality}"] = judge(task, model, blank=modality)
    options.out.mkdir(parents=True, exist_ok=True)
    _save(model, options.out / "street.safetensors")
    record: dict[str, Any] = {
        "command": _command(options),
        "seed": options.seed,
        "steps": dict(zip((*MODALITIES, "fusion"), options.steps, strict=True)),
        "batch": BATCH,
        "dead_sensor_share": task.dead_share,
        "precision": options.precision,
        "threads": options.threads,
        "minutes": round((time.monotonic() - began) / 60, 1),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "world": world.VERSION,
        "split": "eval",
        "n": task.samples["eval"],
        "metrics": {name: values["all"] for name, values in found.items()},
        "first_64": {name: values["first_64"] for name, values in found.items()},
    }
    (options.out / "metrics.json").write_text(json.dumps(record, indent=2) + "\n")
    for name, values in record["metrics"].items():
        LOG.info("%s %s", name, " ".join(f"{metric}={value:.3f}" for metric, value in values.items()))


if __name__ == "__main__":
    main(sys.argv[1:])
